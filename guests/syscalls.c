#include "guest.h"
void guest_main(void) { FAULTS("ud2", UD, 0, "ud2", :); check("x", true);}
