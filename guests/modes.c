/*
 * The way from 64-bit mode down and back: compatibility mode, 32-bit protected mode, 16-bit protected
 * mode, real mode with an interrupt and an unreal FS; then the same once more into 5-level paging.
 *
 * Intel SDM vol. 3, 9.8 and 9.9; 4.5 for LA57.
 */
#include "guest.h"

#define REAL_CODE 0x8000

struct results {
    u16 real_data, real_cs, interrupt;
    u16 unreal;
};
static volatile struct results *const results = (volatile struct results *)0x9000;
extern u64 boot_pml4[512];
static u64 pml5[512] __attribute__((aligned(4096)));
static u8 far_byte;
volatile u64 trip_sp, trip_efer, trip_cs;
struct table_pointer real_idt = {0x3ff, 0};
extern const u8 real_code[], real_code_end[];
void trip(u64 cr3_value, u64 cr4_value, void *unreal);

__asm__(".globl trip\n"
        "trip:\n"
        "    push %rbx\n"
        "    push %rbp\n"
        "    mov %rsp, trip_sp\n"
        "    mov %edi, %ebx\n"
        "    mov %edx, %edi\n"
        "    pushq $0x48\n"
        "    pushq $1f\n"
        "    lretq\n"
        "    .code32\n"
        "1:  movl %cs, %eax\n"
        "    movl %eax, trip_cs\n"
        "    movl $0x10, %eax\n"
        "    movl %eax, %ss\n"
        "    movl %eax, %fs\n"
        "    movl %cr0, %eax\n"
        "    andl $0x7fffffff, %eax\n"
        "    movl %eax, %cr0\n"
        "    movl $0xc0000080, %ecx\n"
        "    rdmsr\n"
        "    movl %eax, trip_efer\n"
        "    movl %esi, %cr4\n"
        "    lidt real_idt\n"
        "    ljmp $0x50, $0x8000\n"
        "real_back:\n"
        "    movl $0x10, %eax\n"
        "    movl %eax, %ds\n"
        "    movl %eax, %es\n"
        "    movl %eax, %ss\n"
        "    movl %ebx, %cr3\n"
        "    movl %cr0, %eax\n"
        "    orl $0x80000000, %eax\n"
        "    movl %eax, %cr0\n"
        "    ljmp $0x08, $1f\n"
        "    .code64\n"
        "1:  mov trip_sp, %rsp\n"
        "    lidt idt_pointer\n"
        "    pop %rbp\n"
        "    pop %rbx\n"
        "    ret\n"
        "    .code16\n"
        ".globl real_code, real_code_end\n"
        "real_code:\n" /* at REAL_CODE */
        "    movw $0x58, %ax\n"
        "    movw %ax, %ds\n"
        "    movw %ax, %es\n"
        "    movw %ax, %ss\n"
        "    movl %cr0, %eax\n"
        "    andb $0xfe, %al\n"
        "    movl %eax, %cr0\n"
        "    ljmp $0x0800, $1f - real_code\n"
        "1:  xorw %ax, %ax\n"
        "    movw %ax, %ds\n"
        "    movw %ax, %ss\n"
        "    movw $0x7c00, %sp\n"
        "    movw $0x1234, 0x9000\n"
        "    movw %cs, %ax\n"
        "    movw %ax, 0x9002\n"
        "    movw $2f - real_code, 0x100\n" /* vector 0x40 */
        "    movw $0x0800, 0x102\n"
        "    int $0x40\n"
        "    movb %fs:(%edi), %al\n" /* above 64 KiB: FS kept its limit */
        "    movb %al, 0x9006\n"
        "    movl %cr0, %eax\n"
        "    orb $1, %al\n"
        "    movl %eax, %cr0\n"
        "    ljmpl $0x48, $real_back\n"
        "2:  movw $0x5678, 0x9004\n"
        "    iretw\n"
        "real_code_end:\n"
        "    .code64\n");

static void there_and_back(u64 cr3_value, u64 cr4_value)
{
    memset((void *)results, 0, sizeof(*results));
    memcpy((void *)REAL_CODE, real_code, (word)(real_code_end - real_code));
    far_byte = 0x77;
    trip(cr3_value, cr4_value, &far_byte);
    check_equal("compatibility-cs", trip_cs, SEL_CODE32);
    check_equal("lma-clear-without-paging", trip_efer & (EFER_LMA | EFER_LME), EFER_LME);
    check_equal("real-mode-store", results->real_data, 0x1234);
    check_equal("real-mode-cs", results->real_cs, REAL_CODE / 16);
    check_equal("real-mode-int", results->interrupt, 0x5678);
    check_equal("unreal-fs", results->unreal & 0xff, far_byte);
    check("long-mode-again", rdmsr(MSR_EFER) & EFER_LMA);
    FAULTS("exceptions-again", UD, 0, "ud2", :);
}

void guest_main(void)
{
    there_and_back(cr3(), cr4());
    if (!(cpuid(7, 0).c & BIT(16))) {
        skip("la57", "not there");
        return;
    }
    FAULTS("gp-la57-in-long-mode", GP, 0, "mov %0, %%cr4", : : "r"(cr4() | CR4_LA57));
    FAULTS("four-level-address", GP, 0, "movb (%0), %%al", : : "r"(BIT(48)) : "eax");
    check_group = "la57-";
    pml5[0] = (word)boot_pml4 | 7;
    there_and_back((word)pml5, cr4() | CR4_LA57);
    check("cr4", cr4() & CR4_LA57);
    TRY("movb (%0), %%al", : : "r"(BIT(48)) : "eax");
    check("five-level-address", trap.vector == PF && trap.error == 0 && trap.cr2 == BIT(48));
    pml5[1] = (word)boot_pml4 | 7;
    WORKS("mapped", "movb (%0), %%al", : : "r"(BIT(48) + (word)&far_byte) : "eax");
    FAULTS("noncanonical", GP, 0, "movb (%0), %%al", : : "r"(BIT(56)) : "eax");
    pml5[1] |= 0x80;
    set_cr3(cr3());
    TRY("movb (%0), %%al", : : "r"(BIT(48)) : "eax");
    check("reserved-ps", trap.vector == PF && trap.error == 9);
    check_group = "back-";
    there_and_back((word)boot_pml4, cr4() & ~CR4_LA57);
    FAULTS("four-level-address", GP, 0, "movb (%0), %%al", : : "r"(BIT(48)) : "eax");
}
