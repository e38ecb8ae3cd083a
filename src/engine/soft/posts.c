#include "engine/soft/posts.h"

#include "engine/soft/block.h"
#include "engine/soft/bt/bt.h"
#include "engine/soft/mmu.h"

#include <sched.h>
#include <time.h>

/* How long to look for an answer before the processor is given to others, and before it is left alone. */
#define SPINS 200
#define YIELDS 100
#define NAP_NS 50000

enum { POST_WRITTEN, POST_PROTECT, POST_PROTECT_ALL, POST_HOLD };

/* Returns the ticket: the post is answered when to->posts_answered has come to it. */
static u64 post(struct soft_vcpu *to, struct soft_post p)
{
    u64 ticket;

    pthread_mutex_lock(&to->posts_lock);
    ticket = ++to->posts_sent;
    if (to->nposts < SOFT_POSTS)
        to->posts[to->nposts++] = p;
    else
        to->posts_lost = true;
    pthread_mutex_unlock(&to->posts_lock);
    soft_attend(to, ATTN_POSTS);
    return ticket;
}

void soft_post_written(struct soft_vcpu *to, gpa_t gpa, u64 len)
{
    post(to, (struct soft_post){POST_WRITTEN, gpa, len});
}

/* Between looks at what another thread has to do: the n-th time. */
static void relax(unsigned n)
{
    const struct timespec nap = {.tv_nsec = NAP_NS};

    if (n < SPINS)
        __builtin_ia32_pause();
    else if (n < SPINS + YIELDS)
        sched_yield();
    else
        nanosleep(&nap, NULL);
}

/* --- Answering --- */

static void take(struct soft_vcpu *v, const struct soft_post *p)
{
    switch (p->kind) {
    case POST_WRITTEN:
        block_cache_drop(v, p->gpa, p->len);
        break;
    case POST_PROTECT:
        soft_tlb_protect(v, p->gpa);
        break;
    case POST_PROTECT_ALL:
        soft_tlb_protect_all(v);
        break;
    case POST_HOLD: /* soft_take_posts does */
        break;
    }
}

/* Those that are there now. */
static void take_all(struct soft_vcpu *v)
{
    struct soft_post posts[SOFT_POSTS];
    unsigned nposts;
    u64 ticket;
    bool lost;

    if (atomic_load(&v->posts_sent) == v->posts_taken)
        return;
    pthread_mutex_lock(&v->posts_lock);
    nposts = v->nposts;
    for (unsigned n = 0; n < nposts; n++)
        posts[n] = v->posts[n];
    lost = v->posts_lost;
    ticket = v->posts_sent;
    v->nposts = 0;
    v->posts_lost = false;
    pthread_mutex_unlock(&v->posts_lock);
    for (unsigned n = 0; n < nposts; n++)
        take(v, &posts[n]);
    if (lost) { /* whatever it was that had no place */
        block_cache_drop_all(v);
        soft_tlb_protect_all(v);
    }
    v->posts_taken = ticket;
    atomic_store(&v->posts_answered, ticket);
}

/* Waits while another vCPU runs alone, which may ask for more meanwhile. */
void soft_take_posts(struct soft_vcpu *v)
{
    const struct soft_engine *e = v->engine;

    for (unsigned n = 0;; n++) {
        unsigned alone = atomic_load(&e->exclusive);

        take_all(v);
        if (likely(!alone || alone == v->index + 1))
            break;
        relax(n);
    }
}

/* Who asks sets attention and then looks at asleep; the vCPU clears asleep and then looks at attention. */
void soft_posts_begin_sleep(struct soft_vcpu *v)
{
    atomic_store(&v->asleep, true);
}

void soft_posts_end_sleep(struct soft_vcpu *v)
{
    atomic_store(&v->asleep, false);
}

/* --- Asking --- */

/* v: who asks, and may be asked meanwhile; NULL: no vCPU. */
static void ask(struct soft_engine *e, struct soft_vcpu *v, u64 others, struct soft_post p)
{
    u64 tickets[SOFT_MAX_CPUS] = {0};

    for (u64 left = others; left; left &= left - 1) {
        unsigned n = (unsigned)__builtin_ctzll(left);

        tickets[n] = post(e->vcpus[n], p);
    }
    for (u64 left = others; left; left &= left - 1) {
        unsigned n = (unsigned)__builtin_ctzll(left);
        struct soft_vcpu *to = e->vcpus[n];

        for (unsigned k = 0;
             atomic_load(&to->posts_answered) < tickets[n] && !atomic_load(&to->asleep); k++) {
            if (v)
                soft_take_posts(v);
            relax(k);
        }
    }
}

void soft_ask_written(struct soft_vcpu *v, u64 others, gpa_t gpa, u64 len)
{
    ask(v->engine, v, others, (struct soft_post){POST_WRITTEN, gpa, len});
}

void soft_ask_protect(struct soft_vcpu *v, u64 others, gpa_t page)
{
    ask(v->engine, v, others, (struct soft_post){.kind = POST_PROTECT, .gpa = page});
}

static u64 all_vcpus(const struct soft_engine *e)
{
    u64 all = 0;

    for (unsigned n = 0; n < e->nvcpus; n++)
        if (e->vcpus[n])
            all |= BIT(n);
    return all;
}

void soft_exclusive_begin(struct soft_vcpu *v)
{
    struct soft_engine *e = v->engine;
    unsigned nobody = 0;

    if (e->nvcpus == 1)
        return;
    soft_vectors_sync(v);
    while (!atomic_compare_exchange_weak(&e->exclusive, &nobody, v->index + 1)) {
        soft_take_posts(v);
        nobody = 0;
    }
    ask(e, v, all_vcpus(e) & ~BIT(v->index), (struct soft_post){.kind = POST_HOLD});
}

void soft_exclusive_end(struct soft_vcpu *v)
{
    atomic_store(&v->engine->exclusive, 0);
}

void soft_protect_everywhere(struct soft_engine *e)
{
    ask(e, NULL, all_vcpus(e), (struct soft_post){.kind = POST_PROTECT_ALL});
}
