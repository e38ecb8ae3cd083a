/*
 * The boot sector of a disk whose next sectors hold a guest's image: for emulators that have a BIOS
 * and a disk, but no loader for multiboot.
 *
 * The linker gets (--defsym) what it must know of the guest: image_sectors, image_dwords and
 * bss_dwords for lengths, image_base for where it belongs, entry for where it begins. The image is
 * read below 640 KiB by INT 13h function 42h (Enhanced Disk Drive Specification 1.1), 32 KiB at a
 * time, then moved up in protected mode, since the BIOS leaves real mode's 1 MiB of reach. The
 * guest starts as the Multiboot Specification 0.6.96, section 3.2, has it, with an information
 * structure that says nothing (flags 0).
 */
#define STAGE 0x10000 /* where the BIOS reads to: up to 0x90000, hence 512 KiB of image at most */
#define CHUNK 64      /* sectors */

        .code16
        .globl  _start
_start:
        ljmp    $0, $1f
1:      cli
        xorw    %ax, %ax
        movw    %ax, %ds
        movw    %ax, %es
        movw    %ax, %ss
        movw    $_start, %sp
        sti
        cld
        movw    $image_sectors, %bp
next:   movw    $CHUNK, %ax
        cmpw    %ax, %bp
        jae     1f
        movw    %bp, %ax
1:      movw    %ax, packet_count
        subw    %ax, %bp
        movw    $packet, %si
        movb    $0x42, %ah              /* DL is still the BIOS's: the drive booted from */
        int     $0x13
        jc      failed
        addl    $CHUNK, packet_lba
        addw    $CHUNK * 512 / 16, packet_segment
        testw   %bp, %bp
        jnz     next

        cli
        inb     $0x92, %al              /* A20, without the reset in bit 0 */
        orb     $2, %al
        andb    $0xfe, %al
        outb    %al, $0x92
        lgdt    gdt_pointer
        movl    %cr0, %eax
        orb     $1, %al
        movl    %eax, %cr0
        ljmp    $8, $protected

/* No BIOS of this world says more than 'E' here. */
failed: movw    $0x0e45, %ax
        movw    $7, %bx
        int     $0x10
1:      hlt
        jmp     1b

        .code32
protected:
        movl    $16, %eax
        movl    %eax, %ds
        movl    %eax, %es
        movl    %eax, %fs
        movl    %eax, %gs
        movl    %eax, %ss
        movl    $STAGE, %esi
        movl    $image_base, %edi
        movl    $image_dwords, %ecx
        rep movsl
        xorl    %eax, %eax
        movl    $bss_dwords, %ecx
        rep stosl
        movl    $0x2badb002, %eax
        movl    $information, %ebx
        movl    $entry, %ecx
        jmp     *%ecx

        .balign 4
packet: .byte   16, 0
packet_count:
        .word   0
        .word   0
packet_segment:
        .word   STAGE / 16
packet_lba:
        .long   1, 0

        .balign 8
gdt:    .quad   0, 0x00cf9b000000ffff, 0x00cf93000000ffff
gdt_pointer:
        .word   gdt_pointer - gdt - 1
        .long   gdt

        .balign 4
information:
        .skip   88
        .org    510
        .word   0xaa55
