/*
 * A capture of packets in a file that tcpdump and Wireshark read (the classic format, with
 * nanoseconds). A thread writes it, so that a slow disk holds up nobody: packets that find no room
 * are left out, and how many is told at the end.
 */
#ifndef DOPPEL_NET_PCAP_H
#define DOPPEL_NET_PCAP_H

#include "host/error.h"
#include "host/types.h"

#include <sys/uio.h>

struct pcap;

/* NULL with err set. */
struct pcap *pcap_open(const char *path, struct error *err);
/* Writes what is left. */
void pcap_close(struct pcap *p);

void pcap_packet(struct pcap *p, const u8 *packet, size_t len);
void pcap_packet_iov(struct pcap *p, const struct iovec *iov, unsigned n, size_t len);

#endif
