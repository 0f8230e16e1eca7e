/* SPDX-License-Identifier: MIT OR GPL-2.0-only */
/* One address type for both families: 16 bytes in network byte order, IPv4 as
 * ::ffff:a.b.c.d (RFC 4291, 2.5.5.2). One program text serves both. */
#pragma once

#include "vmlinux.h"
#include <bpf/bpf_helpers.h>

struct address {
	__be32 word[4];
};

/* 0x0000ffff in network byte order, on the little-endian machines we run on. */
#define MAPPED_PREFIX 0xffff0000U

static __always_inline struct address address_from_ip4(__be32 ip)
{
	struct address a = { .word = { 0, 0, MAPPED_PREFIX, ip } };

	return a;
}

static __always_inline bool address_equal(const struct address *a, const struct address *b)
{
	return a->word[3] == b->word[3] && a->word[2] == b->word[2] && a->word[1] == b->word[1] &&
	       a->word[0] == b->word[0];
}
