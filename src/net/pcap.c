#include "net/pcap.h"

#include "host/log.h"

#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

#define RING_SIZE MIB(4)
#define MAGIC_NANOSECONDS 0xa1b23c4d
#define LINKTYPE_ETHERNET 1
#define SNAP_LENGTH 262144

struct pcap_header {
    u32 magic;
    u16 major, minor;
    u32 zone, accuracy;
    u32 snap_length, link_type;
};

struct pcap_record {
    u32 seconds, nanoseconds;
    u32 captured, length;
};

struct pcap {
    int fd;
    char *path;
    pthread_t thread;
    pthread_mutex_t lock;
    pthread_cond_t more;
    bool ending, failed;
    u64 lost;
    u64 head, tail; /* bytes ever taken and put; their difference is at most RING_SIZE */
    u8 *ring;
};

/* Writes all of it; -errno when the file takes no more. */
static int write_all(int fd, const u8 *buf, size_t len)
{
    while (len) {
        ssize_t n = write(fd, buf, len);

        if (n < 0 && errno == EINTR)
            continue;
        if (n < 0)
            return -errno;
        buf += n;
        len -= (size_t)n;
    }
    return 0;
}

static void *writer(void *opaque)
{
    struct pcap *p = opaque;
    int ret = 0;

    pthread_mutex_lock(&p->lock);
    for (;;) {
        size_t at, len;

        while (p->head == p->tail && !p->ending)
            pthread_cond_wait(&p->more, &p->lock);
        if (p->head == p->tail)
            break;
        at = p->head % RING_SIZE;
        len = MIN(p->tail - p->head, RING_SIZE - at);
        pthread_mutex_unlock(&p->lock);
        ret = write_all(p->fd, p->ring + at, len);
        pthread_mutex_lock(&p->lock);
        if (ret) {
            p->failed = true;
            break;
        }
        p->head += len;
    }
    pthread_mutex_unlock(&p->lock);
    if (ret)
        log_warn("%s: the capture ends here: %s", p->path, strerror(-ret));
    return NULL;
}

/* The lock is held, and there is room. */
static void ring_put(struct pcap *p, const void *data, size_t len)
{
    size_t at = p->tail % RING_SIZE, first = MIN(len, RING_SIZE - at);

    memcpy(p->ring + at, data, first);
    memcpy(p->ring, (const u8 *)data + first, len - first);
    p->tail += len;
}

void pcap_packet_iov(struct pcap *p, const struct iovec *iov, unsigned n, size_t len)
{
    struct pcap_record record = {.captured = (u32)len, .length = (u32)len};
    struct timespec now;

    clock_gettime(CLOCK_REALTIME, &now);
    record.seconds = (u32)now.tv_sec;
    record.nanoseconds = (u32)now.tv_nsec;
    pthread_mutex_lock(&p->lock);
    if (p->failed || RING_SIZE - (p->tail - p->head) < sizeof(record) + len) {
        p->lost++;
    } else {
        ring_put(p, &record, sizeof(record));
        for (unsigned i = 0; i < n; i++)
            ring_put(p, iov[i].iov_base, iov[i].iov_len);
        pthread_cond_signal(&p->more);
    }
    pthread_mutex_unlock(&p->lock);
}

void pcap_packet(struct pcap *p, const u8 *packet, size_t len)
{
    struct iovec iov = {.iov_base = (void *)packet, .iov_len = len};

    pcap_packet_iov(p, &iov, 1, len);
}

static void pcap_free(struct pcap *p)
{
    if (p->fd >= 0)
        close(p->fd);
    pthread_cond_destroy(&p->more);
    pthread_mutex_destroy(&p->lock);
    free(p->ring);
    free(p->path);
    free(p);
}

struct pcap *pcap_open(const char *path, struct error *err)
{
    struct pcap_header header = {
        .magic = MAGIC_NANOSECONDS,
        .major = 2,
        .minor = 4,
        .snap_length = SNAP_LENGTH,
        .link_type = LINKTYPE_ETHERNET,
    };
    struct pcap *p = calloc(1, sizeof(*p));
    int ret;

    if (!p) {
        error_host(err, ENOMEM, "%s", path);
        return NULL;
    }
    pthread_mutex_init(&p->lock, NULL);
    pthread_cond_init(&p->more, NULL);
    p->path = strdup(path);
    p->ring = malloc(RING_SIZE);
    p->fd = open(path, O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0644);
    if (p->fd < 0) {
        error_input(err, "pcap=%s: %s", path, strerror(errno));
        goto fail;
    }
    if (!p->path || !p->ring) {
        error_host(err, ENOMEM, "%s", path);
        goto fail;
    }
    ring_put(p, &header, sizeof(header));
    ret = pthread_create(&p->thread, NULL, writer, p);
    if (ret == 0)
        return p;
    error_host(err, ret, "%s: cannot create a thread", path);
fail:
    pcap_free(p);
    return NULL;
}

void pcap_close(struct pcap *p)
{
    pthread_mutex_lock(&p->lock);
    p->ending = true;
    pthread_cond_signal(&p->more);
    pthread_mutex_unlock(&p->lock);
    pthread_join(p->thread, NULL);
    if (p->lost)
        log_warn("%s: %llu packets are missing from the capture: the file was too slow or full",
                 p->path, (unsigned long long)p->lost);
    pcap_free(p);
}
