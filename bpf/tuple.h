/* SPDX-License-Identifier: MIT OR GPL-2.0-only */
/* What is said of tuples: who answers one, and whether it is another. */
#pragma once

#include "packet.h"

static __always_inline bool is_ip4(const struct address *a)
{
	return a->word[0] == 0 && a->word[1] == 0 && a->word[2] == MAPPED_PREFIX;
}

/* is_loopback says that an address is each network namespace's own (RFC 1122, 3.2.1.3;
 * RFC 4291, 2.5.3). */
static __always_inline bool is_loopback(const struct address *a)
{
	if (is_ip4(a))
		return (a->word[3] & 0xff) == 127;
	return !a->word[0] && !a->word[1] && !a->word[2] && a->word[3] == 0x01000000;
}

static __always_inline void reverse(const struct tuple *of, struct tuple *to)
{
	to->source = of->destination;
	to->destination = of->source;
	to->source_port = of->destination_port;
	to->destination_port = of->source_port;
	to->protocol = of->protocol;
	to->zero[0] = to->zero[1] = to->zero[2] = 0;
}

static __always_inline bool tuple_equal(const struct tuple *a, const struct tuple *b)
{
	return address_equal(&a->source, &b->source) && address_equal(&a->destination, &b->destination) &&
	       a->source_port == b->source_port && a->destination_port == b->destination_port &&
	       a->protocol == b->protocol;
}

/* short_of is enough of a key to tell that an entry found under it was given to
 * another flow while it was read (layer/service/service.h says why): the ports, and one word
 * of each address. */
static __always_inline __u64 short_of(const struct tuple *key)
{
	return ((__u64)key->source_port << 48 | (__u64)key->destination_port << 32) ^ (__u64)key->source.word[3] << 16 ^
	       key->destination.word[3];
}

static __always_inline __u32 seconds(void)
{
	return bpf_ktime_get_coarse_ns() / 1000000000;
}
