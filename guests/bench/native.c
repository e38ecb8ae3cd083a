/* The kernels as a Linux program: what the processor itself takes for them. Lines as in guest.c. */
#include <stdio.h>

#include "kernels.h"

int main(void)
{
    setvbuf(stdout, NULL, _IONBF, 0);
    kernels_prepare();
    for (const struct kernel *k = kernels; k < kernels + kernel_count; k++) {
        printf("begin %s\n", k->name);
        printf("end %s %#llx\n", k->name, k->run(k->n));
    }
    printf("done\n");
    return 0;
}
