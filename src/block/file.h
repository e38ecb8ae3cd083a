/*
 * The file under a disk image: whole reads and writes, zeroes, and the lock against a second user.
 *
 * One writer or any number of readers: an open file description lock on the whole file (fcntl(2),
 * F_OFD_SETLK), which goes with the process, however that ends.
 */
#ifndef DOPPEL_BLOCK_FILE_H
#define DOPPEL_BLOCK_FILE_H

#include "host/error.h"
#include "host/types.h"

#include <sys/uio.h>

struct block_file {
    int fd;
    char *path; /* owned */
    bool writable;
};

/* 0, or -errno with err set: the file's name is in it, and what is to be done. */
int file_open(struct block_file *f, const char *path, bool writable, struct error *err);
/* Creates an empty one; an existing file is an error unless `replace`. */
int file_create(struct block_file *f, const char *path, bool replace, struct error *err);
/* fd -1 is fine. */
void file_close(struct block_file *f);

/* Bytes in a file or a block device. 0 or -errno. */
int file_size(const struct block_file *f, u64 *size);

/* All of it, or -errno. What lies behind the end reads as zeroes. Any thread. */
int file_read(const struct block_file *f, u64 offset, void *buf, u64 len);
int file_readv(const struct block_file *f, u64 offset, const struct iovec *iov, unsigned n);
int file_write(const struct block_file *f, u64 offset, const void *buf, u64 len);
int file_writev(const struct block_file *f, u64 offset, const struct iovec *iov, unsigned n);
/* Zeroes: by giving the space back (unmap), by a zeroed range, or by writing, as the file can. */
int file_zero(const struct block_file *f, u64 offset, u64 len, bool unmap);
/* Gives the space back where the file can; it reads as zeroes then, or as before. */
int file_discard(const struct block_file *f, u64 offset, u64 len);
/* What was written is on the medium. */
int file_sync(const struct block_file *f);

#endif
