/*
 * A triple fault ends the machine: an exception, and neither it nor the double fault has a gate.
 */
#include "guest.h"

void guest_main(void)
{
    struct table_pointer none = {0, 0};

    check("before-the-triple-fault", true);
    __asm__ volatile("lidt %0; ud2" : : "m"(none));
    check("after-the-triple-fault", false);
}
