/*
 * Devices of another process: what the guest asks for reaches the backend and its answers reach the guest, over resets,
 * pauses and the backend's death; and what a backend does wrong is the end of it, not ours.
 */
#include "device/virtio/vhost_user.h"
#include "vhost_rig.h"
#include "virtio_rig.h"

#include <setjmp.h>
#include <stdarg.h>

#include <cmocka.h>

#define CAPACITY 1234 /* sectors */
#define BLK_F_FLUSH BIT(9)
#define BLK_F_CONFIG_WCE BIT(11)
#define NET_F_MRG_RXBUF BIT(15)
#define NET_F_STATUS BIT(16)

static const u8 mac[] = {0x52, 0x54, 0, 1, 2, 3};

struct bench {
    struct peer *peer;
    struct driver *d;
    struct virtio *v;
    gpa_t told; /* where memory was written last, as the engine hears */
};

static void written(void *opaque, gpa_t gpa, u64 len)
{
    struct bench *b = opaque;

    if (gpa >= BUFFERS && gpa < RIG_MEMORY)
        b->told = gpa;
}

static struct virtio *create(struct bench *b, enum vhost_user_kind kind)
{
    struct vhost_user_config cfg = {
        .kind = kind, .path = b->peer->path, .queues = 1, .mac = mac, .tag = "tag"};

    return vhost_user_create(&b->d->rig->env, &cfg, b->d->host, TOY_DEVFN, &b->d->rig->err);
}

/* A rig whose memory is in a file, and a peer that is a disk. */
static struct bench *prepare(void)
{
    struct bench *b = calloc(1, sizeof(*b));
    struct rig *r;

    b->peer = peer_create();
    b->peer->config[0] = CAPACITY & 0xff;
    b->peer->config[1] = CAPACITY >> 8;
    b->d = bare_driver();
    r = b->d->rig;
    memory_destroy(&r->memory);
    assert_int_equal(memory_use_file(&r->memory, true, &r->err), 0);
    assert_int_equal(memory_add_slot(&r->memory, 0, RIG_MEMORY, 0, &r->err), 0);
    r->memory.listener = (struct memory_listener){written, b};
    return b;
}

static struct bench *bench_create(enum vhost_user_kind kind)
{
    struct bench *b = prepare();

    b->peer->features |= BLK_F_FLUSH | BLK_F_CONFIG_WCE | NET_F_MRG_RXBUF;
    b->v = create(b, kind);
    assert_non_null(b->v);
    place(b->d);
    return b;
}

static void bench_destroy(struct bench *b)
{
    b->d->rig->memory.listener = (struct memory_listener){0};
    finish(b->d, b->v);
    peer_destroy(b->peer);
    free(b);
}

#define PATIENCE_MS 20000

/* Runs the loop until the peer, locked, is as wanted. */
#define wait_until(b, condition)                                                                   \
    do {                                                                                           \
        bool met_ = false;                                                                         \
        for (unsigned ms_ = 0; !met_ && ms_ < PATIENCE_MS; ms_++) {                                \
            run_loop((b)->d);                                                                      \
            pthread_mutex_lock(&(b)->peer->lock);                                                  \
            met_ = (condition);                                                                    \
            pthread_mutex_unlock(&(b)->peer->lock);                                                \
            if (!met_)                                                                             \
                usleep(1000);                                                                      \
        }                                                                                          \
        assert_true(met_);                                                                         \
    } while (0)

static void start(struct bench *b, u64 features, unsigned q)
{
    start_queue(b->d, features, q);
    wait_until(b, b->peer->rings[q].started);
}

/* The peer's next chain; asserts that there is one. */
static int pop(struct bench *b, unsigned q, struct peer_desc *desc, unsigned *n)
{
    int head;

    wait_until(b, b->peer->rings[q].started);
    pthread_mutex_lock(&b->peer->lock);
    head = peer_pop(b->peer, q, desc, n);
    pthread_mutex_unlock(&b->peer->lock);
    assert_true(head >= 0);
    return head;
}

static void push(struct bench *b, unsigned q, int head, u32 len)
{
    pthread_mutex_lock(&b->peer->lock);
    peer_push(b->peer, q, (u32)head, len);
    pthread_mutex_unlock(&b->peer->lock);
    run_loop(b->d);
}

static const struct buffer request[] = {
    {BUFFERS, 16, false}, {BUFFERS + 0x1000, 512, true}, {BUFFERS + 0x2000, 1, true}};

static void requests_go_to_the_backend_and_back(void **state)
{
    for (int indirect = 0; indirect < 2; indirect++) {
        struct bench *b = prepare();
        struct peer_desc desc[PEER_DESCS];
        unsigned n;
        u32 id, len;
        int head;

        b->peer->features = BIT(30) | BIT(32) | BLK_F_FLUSH | (indirect ? BIT(28) : 0);
        b->v = create(b, VHOST_USER_BLK);
        assert_non_null(b->v);
        place(b->d);
        assert_int_equal(reg_read(b->d, VIRTIO_BAR_DEVICE, 4), CAPACITY);
        assert_true(offered_features(b->d) & BLK_F_FLUSH);
        assert_false(offered_features(b->d) & VIRTIO_F_RING_RESET);
        start(b, BLK_F_FLUSH | (indirect ? VIRTIO_F_RING_PACKED : 0), 0);
        assert_int_equal(b->peer->set_features, b->peer->features);

        memcpy(memory_host(&b->d->rig->memory, BUFFERS, 4), "head", 4);
        add(b->d, request, 3, 5);
        notify_queue(b->d, 0);
        head = pop(b, 0, desc, &n);
        assert_int_equal(n, 3);
        assert_int_equal(desc[1].addr, request[1].at);
        assert_int_equal(desc[1].flags & 2, 2);
        assert_memory_equal(peer_at(b->peer, desc[0].addr), "head", 4);
        memcpy(peer_at(b->peer, desc[1].addr), "data", 4);
        /* More than there is room for is not told the guest. */
        push(b, 0, head, 100000);
        assert_true(take_used(b->d, 3, &id, &len));
        assert_int_equal(id, 5);
        assert_int_equal(len, 513);
        assert_int_equal(b->told, request[2].at);
        assert_memory_equal(memory_host(&b->d->rig->memory, request[1].at, 4), "data", 4);
        bench_destroy(b);
    }
}

static void more_chains_than_the_backend_has_room_for_wait(void **state)
{
    struct bench *b = prepare();
    struct peer_desc desc[PEER_DESCS];
    struct buffer many[100];
    unsigned n, done = 0;
    u32 id, len;

    /* Without indirect tables two such fill its ring. */
    b->peer->features = BIT(30) | BIT(32);
    b->v = create(b, VHOST_USER_BLK);
    place(b->d);
    start(b, 0, 0);
    for (unsigned i = 0; i < ARRAY_SIZE(many); i++)
        many[i] = (struct buffer){BUFFERS + 16 * i, 16, i > 50};
    for (unsigned i = 0; i < 4; i++) {
        /* All share one table. */
        add_indirect(b->d, many, ARRAY_SIZE(many), (u16)i);
    }
    notify_queue(b->d, 0);
    while (done < 4) {
        int head = pop(b, 0, desc, &n);

        assert_int_equal(n, ARRAY_SIZE(many));
        assert_int_equal(desc[99].addr, many[99].at);
        push(b, 0, head, 0);
        assert_true(take_used(b->d, 1, &id, &len));
        assert_int_equal(id, done++);
    }
    bench_destroy(b);
}

static void what_the_backend_does_not_have_it_cannot_give_back(void **state)
{
    static const u32 wrong[] = {1, 256, 0xffffffff};

    for (unsigned i = 0; i < ARRAY_SIZE(wrong); i++) {
        struct bench *b = bench_create(VHOST_USER_BLK);
        struct peer_desc desc[PEER_DESCS];
        unsigned n;
        u32 id, len;

        start(b, 0, 0);
        add(b->d, request, 3, 0);
        notify_queue(b->d, 0);
        assert_int_equal(pop(b, 0, desc, &n), 0);
        push(b, 0, (int)wrong[i], 1);
        assert_false(take_used(b->d, 3, &id, &len));
        assert_int_equal(reg_read(b->d, STATUS, 1), 15); /* not the guest's fault */
        bench_destroy(b);
    }
}

static void a_disks_requests_wait_for_the_next_backend(void **state)
{
    struct bench *b = bench_create(VHOST_USER_BLK);
    struct peer_desc desc[PEER_DESCS];
    unsigned n;
    u32 id, len;

    start(b, BLK_F_CONFIG_WCE, 0);
    reg_write(b->d, VIRTIO_BAR_DEVICE + 32, 1, 1);
    wait_until(b, b->peer->written_config == 1);
    b->peer->written_config = 0;
    add(b->d, request, 3, 1);
    notify_queue(b->d, 0);
    pop(b, 0, desc, &n); /* begun, and lost with it */
    peer_hang_up(b->peer);
    run_loop(b->d);
    add(b->d, request, 3, 4); /* while nobody is there */
    notify_queue(b->d, 0);
    assert_false(take_used(b->d, 3, &id, &len));
    assert_true(virtio_device(b->v)->ops->busy(virtio_device(b->v)));

    wait_until(b, b->peer->connections == 2 && b->peer->rings[0].started);
    assert_int_equal(b->peer->written_config, 1); /* the guest's choice of a cache */
    for (unsigned i = 0; i < 2; i++) {
        push(b, 0, pop(b, 0, desc, &n), 1);
        assert_true(take_used(b->d, 3, &id, &len));
        assert_int_equal(id, i ? 4 : 1);
    }
    bench_destroy(b);
}

static void another_disk_in_its_place_is_not_taken(void **state)
{
    struct bench *b = bench_create(VHOST_USER_BLK);

    start(b, 0, 0);
    b->peer->config[0]++;
    peer_hang_up(b->peer);
    wait_until(b, b->peer->connections == 2 && b->peer->fd < 0);
    b->peer->config[0]--;
    wait_until(b, b->peer->connections == 3 && b->peer->rings[0].started);
    bench_destroy(b);
}

static const struct buffer receive[] = {{BUFFERS, 2000, true}};

static void a_card_gets_its_buffers_back(void **state)
{
    struct bench *b = bench_create(VHOST_USER_NET);
    struct device *dev = virtio_device(b->v);
    struct peer_desc desc[PEER_DESCS];
    unsigned n;
    u32 id, len;

    for (unsigned i = 0; i < sizeof(mac); i++)
        assert_int_equal(reg_read(b->d, VIRTIO_BAR_DEVICE + i, 1), mac[i]);
    start(b, NET_F_MRG_RXBUF, 0);
    assert_true(b->peer->set_features & NET_F_MRG_RXBUF);
    for (u16 i = 0; i < 3; i++)
        add(b->d, receive, 1, i);
    notify_queue(b->d, 0);
    push(b, 0, pop(b, 0, desc, &n), 100);
    assert_true(take_used(b->d, 1, &id, &len));
    assert_int_equal(id, 0);

    /* A pause: the other two are the guest's, as if never taken; then they go out again. */
    dev->ops->stop(dev);
    assert_int_equal(b->peer->stops, 1);
    assert_false(dev->ops->busy(dev));
    assert_false(take_used(b->d, 1, &id, &len));
    dev->ops->start(dev);
    wait_until(b, b->peer->rings[0].started);
    notify_queue(b->d, 0);
    push(b, 0, pop(b, 0, desc, &n), 60);
    assert_true(take_used(b->d, 1, &id, &len));
    assert_int_equal(id, 1);
    assert_int_equal(len, 60);

    /* A reset by the driver ends when the backend has stopped. */
    reg_write(b->d, STATUS, 0, 1);
    wait_until(b, b->peer->stops == 2 && reg_read(b->d, STATUS, 1) == 0);
    start(b, 0, 0);
    add(b->d, receive, 1, 0);
    notify_queue(b->d, 0);
    assert_int_equal(pop(b, 0, desc, &n), 0);

    /* A reset while it is away needs nobody. */
    peer_hang_up(b->peer);
    run_loop(b->d);
    assert_int_equal(reg_read(b->d, VIRTIO_BAR_DEVICE + 6, 2), 0); /* no link */
    reg_write(b->d, STATUS, 0, 1);
    run_loop(b->d);
    assert_int_equal(reg_read(b->d, STATUS, 1), 0);
    bench_destroy(b);
}

static void a_file_systems_requests_fail_without_a_backend(void **state)
{
    struct bench *b = bench_create(VHOST_USER_FS);
    struct {
        u32 len, opcode;
        u64 unique;
        u8 rest[24];
    } in = {.len = sizeof(in), .opcode = 1, .unique = 0x1234};
    struct {
        u32 len;
        s32 error;
        u64 unique;
    } out;
    struct buffer buffers[] = {{BUFFERS, sizeof(in), false}, {BUFFERS + 0x1000, 144, true}};
    struct peer_desc desc[PEER_DESCS];
    unsigned n;
    u32 id, len;

    assert_int_equal(reg_read(b->d, VIRTIO_BAR_DEVICE, 4), 'g' << 16 | 'a' << 8 | 't');
    start(b, 0, 1);
    memory_write(&b->d->rig->memory, BUFFERS, &in, sizeof(in));
    add(b->d, buffers, 2, 0);
    notify_queue(b->d, 1);
    pop(b, 1, desc, &n);
    peer_hang_up(b->peer);
    run_loop(b->d);
    for (unsigned i = 0; i < 2; i++) {
        assert_true(take_used(b->d, 2, &id, &len));
        assert_int_equal(len, sizeof(out));
        memory_read(&b->d->rig->memory, BUFFERS + 0x1000, &out, sizeof(out));
        assert_int_equal(out.error, -ENOTCONN);
        assert_int_equal(out.unique, 0x1234);
        if (i)
            break;
        add(b->d, buffers, 2, 2); /* while nobody is there */
        notify_queue(b->d, 1);
    }
    bench_destroy(b);
}

static void backends_that_make_no_sense_are_refused(void **state)
{
    for (unsigned i = 0; i < 6; i++) {
        struct bench *b = prepare();

        switch (i) {
        case 0:
            b->peer->features &= ~BIT(32); /* legacy */
            break;
        case 1:
            b->peer->features &= ~BIT(30); /* no way to ask for its configuration */
            break;
        case 2:
            b->peer->protocol_features &= ~BIT(9);
            break;
        case 3:
            b->peer->wrong_request = 1;
            break;
        case 4:
            b->peer->wrong_size = 1;
            break;
        case 5:
            b->peer->hangs_up = true;
            break;
        }
        assert_null(create(b, VHOST_USER_BLK));
        assert_int_equal(b->d->rig->err.class, ERROR_INPUT);
        peer_destroy(b->peer);
        pci_host_device(b->d->host)->ops->destroy(pci_host_device(b->d->host));
        event_loop_destroy(b->d->rig->env.loop);
        rig_destroy(b->d->rig);
        free(b->d);
        free(b);
    }
}

static void its_state_is_described(void **state)
{
    struct bench *b = bench_create(VHOST_USER_BLK);
    struct device *dev = virtio_device(b->v);
    size_t len = state_size(dev->state);
    u8 *bytes = malloc(len);

    assert_int_equal(state_desc_check(dev->state, &b->d->rig->err), 0);
    state_save(dev->state, dev, bytes);
    assert_int_equal(state_load(dev->state, dev, bytes, len, &b->d->rig->err), 0);
    free(bytes);
    bench_destroy(b);
}

static void memory_in_one_piece_of_the_file_is_one_region(void **state)
{
    struct guest_memory m = {0};
    struct vhost_region r[4];
    static const struct memory_slot slots[] = {
        {.gpa = 0, .size = 0xa0000, .fd = 7},
        {.gpa = 0xc0000, .size = 0x4000, .fd = 7, .fd_offset = 0xc0000},
        {.gpa = 0x100000, .size = 0x100000, .fd = 7, .fd_offset = 0x100000},
        {.gpa = GIB(4), .size = GIB(1), .fd = 7, .fd_offset = 0x200000},
        {.gpa = GIB(8), .size = 0x1000, .fd = 7, .fd_offset = 0x100},
        {.gpa = GIB(9), .size = GIB(3), .fd = 8, .flags = MEMORY_FILE}, /* none of theirs */
    };

    memcpy(m.slots, slots, sizeof(slots));
    m.nslots = ARRAY_SIZE(slots);
    assert_int_equal(vhost_memory_regions(&m, r, ARRAY_SIZE(r)), 3);
    assert_int_equal(r[0].gpa, GIB(4));
    assert_int_equal(r[0].fd_offset, 0x200000);
    assert_int_equal(r[1].gpa, 0);
    assert_int_equal(r[1].size, 0x200000);
    assert_int_equal(r[2].gpa, GIB(8));
    assert_int_equal(vhost_memory_regions(&m, r, 1), 1);
    assert_int_equal(r[0].fd, 7);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(requests_go_to_the_backend_and_back),
        cmocka_unit_test(more_chains_than_the_backend_has_room_for_wait),
        cmocka_unit_test(what_the_backend_does_not_have_it_cannot_give_back),
        cmocka_unit_test(a_disks_requests_wait_for_the_next_backend),
        cmocka_unit_test(another_disk_in_its_place_is_not_taken),
        cmocka_unit_test(a_card_gets_its_buffers_back),
        cmocka_unit_test(a_file_systems_requests_fail_without_a_backend),
        cmocka_unit_test(backends_that_make_no_sense_are_refused),
        cmocka_unit_test(its_state_is_described),
        cmocka_unit_test(memory_in_one_piece_of_the_file_is_one_region),
    };

    return cmocka_run_group_tests_name("vhost_user", tests, NULL, NULL);
}
