/*
 * The way into a guest and into its exception handlers.
 *
 * A loader enters at `start` in flat 32-bit protected mode without paging, by multiboot 1 (by the
 * addresses in the header, so that a loader takes a 64-bit ELF file too) or by the PVH note. A
 * 64-bit guest maps the first 4 GiB to themselves, for user mode too, and goes on in long mode.
 *
 * What the entry found is kept in boot_entry for guests/boot.c. With MULTIBOOT_BY_ELF, multiboot is
 * the only way in, and by the ELF file's segments.
 */
#include "selectors.h"

        .section .head, "a"
        /* wants modules on pages, and memory information */
        .globl  multiboot_header
multiboot_header:
#ifdef MULTIBOOT_BY_ELF
        .long   0x1badb002, 0x00000003, -(0x1badb002 + 0x00000003)
#else
        .long   0x1badb002, 0x00010003, -(0x1badb002 + 0x00010003)
        .long   multiboot_header, multiboot_header, image_end, bss_end, start

        .section .note.pvh, "a", @note
        .long   4, 4, 18                /* XEN_ELFNOTE_PHYS32_ENTRY */
        .asciz  "Xen"
        .long   start
#endif

        .text
        .code32
        .globl  start
start:
        movl    %eax, boot_entry
        movl    %ebx, boot_entry + 4
        movl    $stack_top, %esp
        pushfl
        popl    boot_entry + 8
        movl    %cr0, %ecx
        movl    %ecx, boot_entry + 12
        movl    %es:boot_entry, %ecx
        movl    %ecx, boot_entry + 16
        /* To the end of each limit: less than 4 GiB ends in a triple fault. */
        movl    %ds:0xfffffffc, %ecx
        movl    %es:0xfffffffc, %ecx
        movl    %ss:0xfffffffc, %ecx
        movl    %cs:0xfffffffc, %ecx
        cmpl    $0x2badb002, %eax       /* PVH leaves FS and GS undefined */
        jne     1f
        movl    %fs:boot_entry, %ecx
        movl    %ecx, boot_entry + 20
        movl    %gs:boot_entry, %ecx
        movl    %ecx, boot_entry + 24
        movl    %fs:0xfffffffc, %ecx
        movl    %gs:0xfffffffc, %ecx
1:      cli
        cld
        lgdt    gdt_pointer
        ljmp    $SEL_BOOT_CODE, $1f
1:      movl    $SEL_DATA, %eax
        movl    %eax, %ds
        movl    %eax, %es
        movl    %eax, %fs
        movl    %eax, %gs
        movl    %eax, %ss
        movl    %cr0, %eax              /* no TS, EM; with MP, NE */
        andl    $~0xc, %eax
        orl     $0x22, %eax
        movl    %eax, %cr0
#ifdef __x86_64__
        /* PML4[0] -> PDPT[0..3] -> four directories of 2 MiB pages */
        movl    $boot_pdpt + 7, boot_pml4
        movl    $boot_pd + 7, %eax
        movl    $boot_pdpt, %edi
        movl    $4, %ecx
1:      movl    %eax, (%edi)
        addl    $0x1000, %eax
        addl    $8, %edi
        loop    1b
        movl    $0x87, %eax
        xorl    %edx, %edx
        movl    $boot_pd, %edi
        movl    $2048, %ecx
1:      movl    %eax, (%edi)
        movl    %edx, 4(%edi)
        addl    $0x200000, %eax
        adcl    $0, %edx
        addl    $8, %edi
        loop    1b
        movl    %cr4, %eax
        orl     $0x6a0, %eax            /* OSXMMEXCPT, OSFXSR, PGE, PAE */
        movl    %eax, %cr4
        movl    $boot_pml4, %eax
        movl    %eax, %cr3
        movl    $0xc0000080, %ecx       /* EFER.LME, NXE */
        rdmsr
        orl     $0x900, %eax
        wrmsr
        movl    %cr0, %eax
        orl     $0x80000000, %eax
        movl    %eax, %cr0
        ljmp    $SEL_CODE, $1f
        .code64
1:      movl    $stack_top, %esp
        call    guest_start
#else
        movl    %cr4, %eax
        orl     $0x600, %eax            /* OSXMMEXCPT, OSFXSR */
        movl    %eax, %cr4
        call    guest_start
#endif
1:      hlt
        jmp     1b

/* Where each vector's gate points: 16 bytes a vector. A vector whose exception has no error code
 * pushes 0 in its place. */
        .balign 16
        .globl  trap_stubs
trap_stubs:
        vector = 0
        .rept   256
        .balign 16
        .if !(vector == 8 || (vector >= 10 && vector <= 14) || vector == 17 || vector == 21)
        push    $0
        .endif
#ifdef __x86_64__
        pushq   $vector
#else
        pushl   $vector
#endif
        jmp     trap_common
        vector = vector + 1
        .endr

#ifdef __x86_64__
trap_common:
        push    %rax
        push    %rcx
        push    %rdx
        push    %rbx
        push    %rbp
        push    %rsi
        push    %rdi
        push    %r8
        push    %r9
        push    %r10
        push    %r11
        push    %r12
        push    %r13
        push    %r14
        push    %r15
        mov     %rsp, %rdi
        mov     %rsp, %rbp
        and     $~15, %rsp
        cld
        call    trap_entry
        mov     %rbp, %rsp
        .globl  trap_return
trap_return:
        pop     %r15
        pop     %r14
        pop     %r13
        pop     %r12
        pop     %r11
        pop     %r10
        pop     %r9
        pop     %r8
        pop     %rdi
        pop     %rsi
        pop     %rbp
        pop     %rbx
        pop     %rdx
        pop     %rcx
        pop     %rax
        add     $16, %rsp
        iretq

/* void user_enter(word ip, word sp, word flags, word cs, word ss): to ring 3, until user_leave(). */
        .globl  user_enter, user_leave
user_enter:
        push    %rbx
        push    %rbp
        push    %r12
        push    %r13
        push    %r14
        push    %r15
        mov     %rsp, user_kernel_sp
        push    %r8
        push    %rsi
        push    %rdx
        push    %rcx
        push    %rdi
        iretq
user_leave:
        mov     user_kernel_sp, %rsp
        mov     $SEL_DATA, %eax
        mov     %eax, %ss
        mov     %eax, %ds
        mov     %eax, %es
        pop     %r15
        pop     %r14
        pop     %r13
        pop     %r12
        pop     %rbp
        pop     %rbx
        ret
#else
trap_common:
        pushal
        push    %ds
        push    %es
        push    %fs
        push    %gs
        movl    $SEL_DATA, %eax
        movl    %eax, %ds
        movl    %eax, %es
        cld
        pushl   %esp
        call    trap_entry
        addl    $4, %esp
        .globl  trap_return
trap_return:
        pop     %gs
        pop     %fs
        pop     %es
        pop     %ds
        popal
        addl    $8, %esp
        iretl

/* void user_enter(word ip, word sp, word flags, word cs, word ss): to ring 3, until user_leave(). */
        .globl  user_enter, user_leave
user_enter:
        pushl   %ebx
        pushl   %ebp
        pushl   %esi
        pushl   %edi
        movl    %esp, user_kernel_sp
        movl    %esp, %eax
        movl    36(%eax), %ecx
        movl    %ecx, %ds
        movl    %ecx, %es
        pushl   36(%eax)
        pushl   24(%eax)
        pushl   28(%eax)
        pushl   32(%eax)
        pushl   20(%eax)
        iretl
user_leave:
        movl    $SEL_DATA, %eax
        movl    %eax, %ds
        movl    %eax, %es
        movl    %eax, %ss
        movl    user_kernel_sp, %esp
        popl    %edi
        popl    %esi
        popl    %ebp
        popl    %ebx
        ret
#endif
/* What a user function returns to. */
        .globl  user_done
user_done:
        int     $VECTOR_USER_DONE

        .section .bss
        .balign 4096
#ifdef __x86_64__
        .globl  boot_pml4
boot_pml4:
        .skip   4096
boot_pdpt:
        .skip   4096
boot_pd:
        .skip   4 * 4096
#endif
        .globl  boot_entry
boot_entry:                             /* struct boot_entry of guest.h */
        .skip   28
        .balign 4096
        .globl  stack_top
        .skip   32768
stack_top:
        .section .note.GNU-stack, "", @progbits
