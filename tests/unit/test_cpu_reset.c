/*
 * RESET, INIT and SIPI leave the state of SDM vol. 3, table 9-1; the field table covers struct cpu.
 */
#include "x86/cpu.h"
#include "x86/lapic.h"
#include "x86/msr.h"

#include <setjmp.h>
#include <stdarg.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

static void tables_cover_their_structs(void **unused)
{
    struct error err = {0};

    if (state_desc_check(&cpu_state_desc, &err) != 0 ||
        state_desc_check(&lapic_state_desc, &err) != 0)
        fail_msg("%s", err.text);
}

static void check_power_on_core(const struct cpu *cpu)
{
    assert_int_equal(cpu->gpr[GPR_RIP], 0xfff0);
    assert_int_equal(cpu->gpr[RAX], 0);
    assert_int_equal(cpu->rflags, 2);
    assert_int_equal(cpu->seg[SEG_CS].selector, 0xf000);
    assert_int_equal(cpu->seg[SEG_CS].base, 0xffff0000);
    assert_int_equal(cpu->seg[SEG_CS].limit, 0xffff);
    assert_int_equal(cpu->seg[SEG_CS].attr, 0x9b);
    assert_int_equal(cpu->seg[SEG_SS].attr, 0x93);
    assert_int_equal(cpu->ldtr.attr, 0x82);
    assert_int_equal(cpu->tr.attr, 0x8b);
    assert_int_equal(cpu->tr.limit, 0xffff);
    assert_int_equal(cpu->gdtr.limit, 0xffff);
    assert_int_equal(cpu->dr[6], 0xffff0ff0);
    assert_int_equal(cpu->dr[7], 0x400);
    assert_int_equal(cpu->cr3 | cpu->cr4 | cpu->cr2, 0);
    assert_int_equal(cpu->msr.efer, 0);
}

static void reset_is_table_9_1(void **unused)
{
    struct cpu cpu;

    memset(&cpu, 0xa5, sizeof(cpu));
    cpu_reset(&cpu, 0);
    check_power_on_core(&cpu);
    assert_int_equal(cpu.cr0, 0x60000010);
    assert_int_equal(cpu.xcr0, 1);
    assert_int_equal(cpu.fcw, 0x40);
    assert_int_equal(cpu.fsw, 0);
    assert_int_equal(cpu.ftw, 0x5555);
    assert_int_equal(cpu.mxcsr, 0x1f80);
    assert_int_equal(cpu.msr.pat, 0x0007040600070406);
    assert_int_equal(cpu.activity, CPU_RUNNING);
    assert_true(cpu.apic_bsp);
    cpu_reset(&cpu, 1);
    assert_int_equal(cpu.activity, CPU_WAIT_FOR_SIPI);
    assert_false(cpu.apic_bsp);
}

static void init_keeps_what_the_manual_says(void **unused)
{
    struct cpu cpu;

    cpu_reset(&cpu, 1);
    cpu.cr0 = CR0_PE | CR0_PG | CR0_CD | CR0_ET;
    cpu.cr4 = CR4_PAE;
    cpu.msr.efer = EFER_LME | EFER_LMA;
    cpu.msr.lstar = 0x1234;
    cpu.msr.mtrr_def_type = 0xc06;
    cpu.msr.pat = 0;
    cpu.tsc_offset = 99;
    cpu.vec[3][5] = 7;
    cpu.fcw = 0x37f;
    cpu.xcr0 = 7;
    cpu.nmi_blocked = true;
    cpu.activity = CPU_RUNNING;
    cpu_init(&cpu);
    check_power_on_core(&cpu);
    assert_int_equal(cpu.cr0, CR0_CD | CR0_ET);
    assert_int_equal(cpu.msr.lstar, 0x1234);
    assert_int_equal(cpu.msr.mtrr_def_type, 0xc06);
    assert_int_equal(cpu.msr.pat, 0);
    assert_int_equal(cpu.tsc_offset, 99);
    assert_int_equal(cpu.vec[3][5], 7);
    assert_int_equal(cpu.fcw, 0x37f);
    assert_int_equal(cpu.xcr0, 7);
    assert_false(cpu.nmi_blocked);
    assert_int_equal(cpu.activity, CPU_WAIT_FOR_SIPI);

    cpu_sipi(&cpu, 0x9a);
    assert_int_equal(cpu.activity, CPU_RUNNING);
    assert_int_equal(cpu.seg[SEG_CS].selector, 0x9a00);
    assert_int_equal(cpu.seg[SEG_CS].base, 0x9a000);
    assert_int_equal(cpu.gpr[GPR_RIP], 0);
}

static void state_survives_save_and_load(void **unused)
{
    size_t size = state_size(&cpu_state_desc);
    u8 *buf = malloc(size);
    struct cpu a, b;
    struct error err;
    char name[64];

    cpu_reset(&a, 0);
    a.seg[SEG_GS].base = 0x123456789;
    a.msr.mc_addr[3] = 42;
    memset(a.vec, 0x5a, sizeof(a.vec));
    a.event_type = CPU_EVENT_PRIV_EXC;
    memset(&b, 0, sizeof(b));
    state_save(&cpu_state_desc, &a, buf);
    assert_int_equal(state_load(&cpu_state_desc, &b, buf, size, &err), 0);
    assert_null(state_compare(&cpu_state_desc, &a, &b, name, sizeof(name)));

    a.activity = CPU_SHUTDOWN + 1;
    state_save(&cpu_state_desc, &a, buf);
    assert_true(state_load(&cpu_state_desc, &b, buf, size, &err) < 0);
    a.activity = CPU_RUNNING;
    a.gpr[GPR_ZERO] = 1;
    state_save(&cpu_state_desc, &a, buf);
    assert_true(state_load(&cpu_state_desc, &b, buf, size, &err) < 0);
    free(buf);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(tables_cover_their_structs),
        cmocka_unit_test(reset_is_table_9_1),
        cmocka_unit_test(init_keeps_what_the_manual_says),
        cmocka_unit_test(state_survives_save_and_load),
    };

    return cmocka_run_group_tests(tests, NULL, NULL);
}
