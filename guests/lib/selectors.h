/* The selectors of every guest's GDT (guest.c). In the order that SYSCALL and SYSENTER want. */
#ifndef GUEST_SELECTORS_H
#define GUEST_SELECTORS_H

#define SEL_CODE 0x08 /* ring 0, as wide as the guest */
#define SEL_DATA 0x10
#define SEL_USER_CODE32 0x1b
#define SEL_USER_DATA 0x23
#define SEL_USER_CODE64 0x2b
#define SEL_USER_DATA2 0x33
#define SEL_TSS 0x38 /* 16 bytes in a 64-bit guest */
#define SEL_CODE32 0x48
#define SEL_CODE16 0x50
#define SEL_DATA16 0x58
#define SEL_TSS_DF 0x60 /* 32-bit guests: the task of #DF */
#define SEL_BOOT_CODE SEL_CODE32
#define SEL_FREE 0x68 /* from here on for the guest's own tests */
#define GDT_ENTRIES 64

#define VECTOR_USER_DONE 0x81

#endif
