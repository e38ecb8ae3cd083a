/*
 * Posts: what other threads ask of a vCPU, which it does between two instructions of its guest.
 *
 * A request is noted at the vCPU and calls for its attention. Who has to know that it is done waits: until the
 * vCPU has answered, or is asleep or stopped, for then it answers before it runs guest code again.
 */
#ifndef DOPPEL_ENGINE_SOFT_POSTS_H
#define DOPPEL_ENGINE_SOFT_POSTS_H

#include "engine/soft/vcpu.h"

/* [gpa, gpa + len) was written by a device: drop its code. Doesn't wait. Any thread. */
void soft_post_written(struct soft_vcpu *to, gpa_t gpa, u64 len);

/*
 * vCPU v asks a set of others, one bit each, and waits, answering what others ask of v. On v's thread, with no
 * lock held and no pointer to guest memory in use.
 */
void soft_ask_written(struct soft_vcpu *v, u64 others, gpa_t gpa, u64 len);
/* Their write tags for the page go. */
void soft_ask_protect(struct soft_vcpu *v, u64 others, gpa_t page);

/*
 * Between these no other vCPU executes an instruction: for a locked access that the host can't do in one piece. On
 * v's thread; what is done in between must not raise a guest's fault. As with the other requests, v may have to
 * answer some first, and what it announced is to be announced anew.
 */
void soft_exclusive_begin(struct soft_vcpu *v);
void soft_exclusive_end(struct soft_vcpu *v);

/* All write tags of all vCPUs go, before this returns. On a thread that is no vCPU's. */
void soft_protect_everywhere(struct soft_engine *e);

/* Does what was asked of v. On the vCPU's thread, or while it does not run. */
void soft_take_posts(struct soft_vcpu *v);

/* Round sleeping, and whatever else runs no guest code and waits: meanwhile nobody waits for v. */
void soft_posts_begin_sleep(struct soft_vcpu *v);
void soft_posts_end_sleep(struct soft_vcpu *v);

#endif
