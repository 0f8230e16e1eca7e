//go:build ignore

// SPDX-License-Identifier: MIT OR GPL-2.0-only
/* Answers to what pods ask the cluster's DNS Service about names of the cluster.
 *
 * dns_from_pod sees what a pod sends before anybody else does. A query that it
 * understands whole, about a name whose state it knows, it turns into the answer and
 * gives back to the pod. Everything else goes its way untouched, to whoever serves
 * the Service: other types and classes, EDNS options, DO and CD, TCP, fragments, IP
 * options, names of other zones, names that it was told to leave.
 *
 * Message format: RFC 1035, 4; EDNS: RFC 6891, 6.1; negative answers: RFC 2308, 2.
 */
#include "../../bpf/packet.h"

/* A name below the zone, in lower case as it is written in messages, without the final
 * zero: "\3web\7default\3svc". Zeros follow. Longer names are left to others. */
#define NAME_LIMIT 96

struct name {
	__u64 word[NAME_LIMIT / 8];
};

/* As many addresses of a family as surely fit into 512 bytes (RFC 1035, 4.2.1) after
 * the longest question; larger sets are left to others. */
#define ADDRESSES 8

enum name_kind {
	NAME_HAS = 1,  /* the addresses below, and no others */
	NAME_LEFT = 2, /* it exists, and somebody else knows what it leads to */
};

struct addresses {
	enum name_kind kind;
	__u8 ip4_count;
	__u8 ip6_count;
	__u8 zero[2];
	__be32 ip4[ADDRESSES];
	struct address ip6[ADDRESSES];
};

struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__type(key, struct name);
	__type(value, struct addresses);
	__uint(max_entries, 131072); /* 2 MB of buckets; entries take memory when they exist */
	__uint(map_flags, BPF_F_NO_PREALLOC);
} names SEC(".maps");

/* The addresses of the cluster's DNS Service. */
struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__type(key, struct address);
	__type(value, __u8);
	__uint(max_entries, 16);
	__uint(map_flags, BPF_F_NO_PREALLOC);
} resolvers SEC(".maps");

/* What the agent says of the names. */
struct authority {
	__u64 beat;   /* when it was last there, in nanoseconds since boot */
	__u32 serial; /* of the zone */
	__u8 whole;   /* a name that is not in names does not exist */
	__u8 zero[3];
};

struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__type(key, __u32);
	__type(value, struct authority);
	__uint(max_entries, 1);
} authorities SEC(".maps");

/* What became of the queries to the DNS Service. The names in metrics are read from
 * this enum's BTF, in lower case and without the prefix. */
enum outcome {
	OUTCOME_ANSWERED,  /* with addresses */
	OUTCOME_NODATA,    /* the name exists, and has no address of that family */
	OUTCOME_NXDOMAIN,  /* there is no such name */
	OUTCOME_NOT_PLAIN, /* passed up: not one plain question for A or AAAA */
	OUTCOME_NOT_OURS,  /* passed up: the name is not one of the cluster's */
	OUTCOME_LEFT,      /* passed up: of the cluster, but not known here */
	OUTCOME_UNSURE,    /* passed up: not all names of the cluster are known, and this is none of them */
	OUTCOME_STALE,     /* passed up: the agent has not been heard of */
	OUTCOME_LOST,      /* dropped: the answer could not be written */
	OUTCOME_COUNT,
};

struct {
	__uint(type, BPF_MAP_TYPE_PERCPU_ARRAY);
	__type(key, __u32);
	__type(value, __u64);
	__uint(max_entries, OUTCOME_COUNT);
} outcomes SEC(".maps");

/* The zone, "\7cluster\5local\0", in words; mask has ones where it has bytes. */
#define ZONE_LIMIT 64
const volatile __u64 zone_word[ZONE_LIMIT / 8] = {};
const volatile __u64 zone_mask[ZONE_LIMIT / 8] = {};
const volatile __u32 zone_length = 0;
/* How long records may be kept, in seconds. */
const volatile __u32 ttl = 5;
/* How long the agent may be silent, in nanoseconds. */
const volatile __u64 silence = 2000000000ULL;

#define DNS_PORT     53
#define DNS_HEADER   12
#define UDP_HEADER   8
#define QUERY_LIMIT  192 /* header, name, type, class and OPT */
#define WIRE_LIMIT   160 /* of a question's name */
#define ANSWER_LIMIT 512
#define LABELS       16
#define OPT_LENGTH   11
#define TYPE_A       1
#define TYPE_SOA     6
#define TYPE_AAAA    28
#define TYPE_OPT     41
#define CLASS_IN     1
/* What an answer may have over UDP without being fragmented anywhere: what OPT says
 * that we take (https://www.dnsflagday.net/2020/). */
#define UDP_PAYLOAD 1232

/* What is known of a query. */
struct question {
	__u32 length;  /* of the message */
	__u32 name;    /* length of its name, with the final zero */
	__u32 below;   /* length of what stands before the zone */
	__u32 labels;  /* how many of them that are */
	__u32 last;    /* offset of the last of them, ... */
	__u32 service; /* ... and of the third last */
	__u16 type;
	__u8 edns;
	__u8 zero;
};

struct desk {
	__u8 asked[QUERY_LIMIT + 64]; /* the query as it came */
	__u8 said[ANSWER_LIMIT + 64];
	__u8 lower[WIRE_LIMIT + NAME_LIMIT + ZONE_LIMIT]; /* its name in lower case, and what follows */
	struct name name;
	struct question question;
};

struct {
	__uint(type, BPF_MAP_TYPE_PERCPU_ARRAY);
	__type(key, __u32);
	__type(value, struct desk);
	__uint(max_entries, 1);
} desks SEC(".maps");

/* The packet that a query came in. */
struct datagram {
	struct address source;
	struct address destination;
	__u32 udp;    /* offset of the UDP header */
	__u32 length; /* of the message */
	bool ip4;
	bool fits; /* the lengths in its headers agree */
};

struct udp_header {
	__be16 source_port;
	__be16 destination_port;
	__be16 length;
	__u16 checksum;
};

static __always_inline void count(enum outcome outcome)
{
	__u32 key = outcome;
	__u64 *n = bpf_map_lookup_elem(&outcomes, &key);

	if (n)
		(*n)++;
}

static __always_inline int pass(enum outcome outcome)
{
	count(outcome);
	return TC_ACT_UNSPEC;
}

/* read_datagram says whether a packet is to port 53 over UDP, whole and without
 * options: few instructions, for every packet of every pod is looked at. */
static __always_inline bool read_datagram(struct __sk_buff *skb, struct datagram *d)
{
	void *data = (void *)(long)skb->data, *end = (void *)(long)skb->data_end;
	const struct udp_header *udp;
	__u32 length;

	if (skb->protocol == __builtin_bswap16(ETHERTYPE_IP4)) {
		const struct ip4_header *ip = data + ETHERNET_LENGTH;

		udp = (const void *)(ip + 1);
		if ((const void *)(udp + 1) > end || ip->version_length != 0x45 || ip->protocol != IPPROTO_UDP ||
		    udp->destination_port != __builtin_bswap16(DNS_PORT) ||
		    from_be16(ip->fragment) & (IP4_MORE_FRAGMENTS | IP4_FRAGMENT_OFFSET))
			return false;
		d->ip4 = true;
		d->source = address_from_ip4(ip->source);
		d->destination = address_from_ip4(ip->destination);
		d->udp = ETHERNET_LENGTH + sizeof(*ip);
		length = from_be16(ip->length) - sizeof(*ip);
	} else if (skb->protocol == __builtin_bswap16(ETHERTYPE_IP6)) {
		const struct ip6_header *ip = data + ETHERNET_LENGTH;

		udp = (const void *)(ip + 1);
		if ((const void *)(udp + 1) > end || *(const __u8 *)ip >> 4 != 6 || ip->next != IPPROTO_UDP ||
		    udp->destination_port != __builtin_bswap16(DNS_PORT))
			return false;
		d->ip4 = false;
		d->source = ip->source;
		d->destination = ip->destination;
		d->udp = ETHERNET_LENGTH + sizeof(*ip);
		length = from_be16(ip->length);
	} else {
		return false;
	}
	d->length = from_be16(udp->length) - UDP_HEADER;
	d->fits =
	    from_be16(udp->length) == length && d->udp + length == skb->len && !skb->gso_size && !skb->vlan_present;
	return true;
}

/* lower_case turns the upper-case letters among eight bytes into lower-case ones. */
static __always_inline __u64 lower_case(__u64 bytes)
{
	const __u64 ones = 0x0101010101010101ULL;
	__u64 low = bytes & 0x7f * ones;
	__u64 above_z = low + (0x7f - 'Z') * ones;
	__u64 from_a = low + (0x80 - 'A') * ones;
	__u64 upper = ~bytes & (from_a ^ above_z) & 0x80 * ones;

	return bytes | upper >> 2;
}

/* read_name finds the end of the question's name, and puts it in lower case. False for
 * what is malformed, compressed or long. */
static __always_inline bool read_name(struct desk *desk, struct question *q)
{
	__u64 *lower = (__u64 *)desk->lower;
	__u32 at = 0;

	for (int i = 0; i < WIRE_LIMIT / 8; i++)
		lower[i] = lower_case(*(__u64 *)(desk->asked + DNS_HEADER + 8 * i));
	for (int i = 0; i < LABELS; i++) {
		if (at >= WIRE_LIMIT)
			return false;
		__u32 length = desk->lower[at];

		if (!length)
			break;
		if (length > 63)
			return false;
		at += length + 1;
	}
	if (at >= WIRE_LIMIT || desk->lower[at])
		return false;
	q->name = at + 1;
	return true;
}

/* read_zone says whether the question's name is below the zone, and finds its labels. */
static __always_inline bool read_zone(struct desk *desk, struct question *q)
{
	__u32 below = q->name - zone_length, at = 0, labels = 0, last = 0, second = 0, third = 0;

	if (q->name <= zone_length || below >= WIRE_LIMIT)
		return false;
	for (int i = 0; i < ZONE_LIMIT / 8; i++) {
		if ((*(__u64 *)(desk->lower + below + 8 * i) & zone_mask[i]) != zone_word[i])
			return false;
	}
	for (int i = 0; i < LABELS; i++) {
		if (at >= below || at >= WIRE_LIMIT)
			break;
		third = second;
		second = last;
		last = at;
		at += desk->lower[at] + 1;
		labels++;
	}
	if (at != below) /* a label reaches into what looks like the zone */
		return false;
	q->below = below;
	q->labels = labels;
	q->last = last;
	q->service = third;
	return true;
}

/* between says whether a number is within bounds. The compiler may not make one comparison
 * of a difference out of both: the verifier of Linux 6.1 learns nothing of the number then. */
static __always_inline bool between(__u32 *number, __u32 least, __u32 most)
{
	if (*number < least)
		return false;
	asm volatile("" : "+r"(*number));
	return *number <= most;
}

static __always_inline __u16 number_at(const __u8 *at)
{
	return at[0] << 8 | at[1];
}

/* is_plain says whether a message is one question for A or AAAA, with or without an
 * EDNS record that asks for nothing. The name has been read. */
static __always_inline bool is_plain(const struct desk *desk, struct question *q)
{
	const __u8 *after = desk->asked + DNS_HEADER;
	__u32 end = DNS_HEADER + q->name + 4;

	if (q->name > WIRE_LIMIT)
		return false;
	after += q->name;
	q->type = number_at(after);
	if ((q->type != TYPE_A && q->type != TYPE_AAAA) || number_at(after + 2) != CLASS_IN)
		return false;
	if (!q->edns)
		return q->length == end;
	after += 4;
	/* root, OPT, any size, no extended code, version 0, no flags, no options */
	return q->length == end + OPT_LENGTH && !after[0] && number_at(after + 1) == TYPE_OPT &&
	       !(after[5] | after[6] | after[7] | after[8] | after[9] | after[10]);
}

/* has_plain_header: a query, of which only RD and AD may be set. */
static __always_inline bool has_plain_header(const __u8 *message)
{
	return !(message[2] & ~0x01) && !(message[3] & ~0x20) && number_at(message + 4) == 1 &&
	       !number_at(message + 6) && !number_at(message + 8) && number_at(message + 10) <= 1;
}

/* read_question copies a query to the desk and reads it. A global function, so that it
 * is verified once. It returns an outcome, or OUTCOME_COUNT to go on. */
__noinline enum outcome read_question(struct __sk_buff *skb, __u32 at, __u32 length)
{
	__u32 zero = 0;
	struct desk *desk = bpf_map_lookup_elem(&desks, &zero);

	if (!desk || !between(&length, DNS_HEADER + 5, QUERY_LIMIT))
		return OUTCOME_NOT_PLAIN;
	struct question *q = &desk->question;

	if (bpf_skb_load_bytes(skb, at, desk->asked, length))
		return OUTCOME_NOT_PLAIN;
	*(__u32 *)(desk->asked + length) = 0; /* checksums are made of words */
	q->length = length;
	q->edns = desk->asked[11];
	if (!has_plain_header(desk->asked) || !read_name(desk, q))
		return OUTCOME_NOT_PLAIN;
	if (!is_plain(desk, q))
		return OUTCOME_NOT_PLAIN;
	return read_zone(desk, q) ? OUTCOME_COUNT : OUTCOME_NOT_OURS;
}

/* find_name looks up what stands from an offset of the name up to the zone. */
static __always_inline struct addresses *find_name(struct desk *desk, __u32 from, __u32 to)
{
	if (from > to || from >= WIRE_LIMIT || to - from > NAME_LIMIT)
		return NULL;
	__u32 length = to - from;

	for (int i = 0; i < NAME_LIMIT / 8; i++) {
		__u64 word = *(__u64 *)(desk->lower + from + 8 * i);

		if (length <= 8 * i)
			word = 0;
		else if (length < 8 * i + 8)
			word &= (1ULL << (length - 8 * i) * 8) - 1;
		desk->name.word[i] = word;
	}
	return bpf_map_lookup_elem(&names, &desk->name);
}

/* Labels as they stand in a name, in the order of its bytes. */
#define LABEL_SVC         0x63767303ULL         /* "\3svc" */
#define LABEL_POD         0x646f7003ULL         /* "\3pod" */
#define LABEL_DNS         0x736e6403ULL         /* "\3dns" */
#define LABEL_DNS_VERSION 0x7265762d736e640bULL /* the first eight of "\13dns-version" */

/* absent decides about a name that is not in names, when all are known
 * (docs/decisions/0014-dns.md has the table). */
static __always_inline enum outcome absent(struct desk *desk, const struct question *q)
{
	if (q->last >= WIRE_LIMIT)
		return OUTCOME_LEFT;
	__u64 bytes = *(__u64 *)(desk->lower + q->last), last = bytes & 0xffffffff;

	/* pods are not in names; the others are the server's own */
	if (last == LABEL_POD || last == LABEL_DNS || bytes == LABEL_DNS_VERSION)
		return OUTCOME_LEFT;
	if (last != LABEL_SVC || q->labels > 5)
		return OUTCOME_NXDOMAIN;
	if (q->labels < 3) /* "svc" or a namespace */
		return OUTCOME_LEFT;
	if (q->labels == 3)
		return OUTCOME_NXDOMAIN;
	/* an endpoint, or a port: whoever knows the Service's knows it */
	return find_name(desk, q->service, q->below) ? OUTCOME_LEFT : OUTCOME_NXDOMAIN;
}

/* put writes eight bytes of the answer. */
static __always_inline void put(struct desk *desk, __u32 at, __u64 bytes)
{
	if (at < ANSWER_LIMIT)
		*(__u64 *)(desk->said + at) = bytes;
}

/* record_head is a record's owner (by a pointer to an offset), type, class, TTL and half
 * of its length, in ten bytes. */
static __always_inline __u32 put_head(struct desk *desk, __u32 at, __u32 owner, __u16 type, __u16 length)
{
	put(desk, at,
	    __builtin_bswap64((0xc000ULL | owner) << 48 | (__u64)type << 32 | (__u64)CLASS_IN << 16 | ttl >> 16));
	put(desk, at + 8, __builtin_bswap64((__u64)(ttl & 0xffff) << 48 | (__u64)length << 32));
	return at + 12;
}

/* put_addresses writes the records of a family, beginning with any of them, so that
 * who takes the first takes another one each time. */
static __always_inline __u32 put_addresses(struct desk *desk, __u32 at, const struct addresses *of, bool ip4)
{
	__u32 n = ip4 ? of->ip4_count : of->ip6_count;

	if (!n || n > ADDRESSES)
		return at;
	__u32 turn = bpf_get_prandom_u32() % n;

	for (int i = 0; i < ADDRESSES; i++) {
		if (i >= n)
			break;
		__u32 k = turn + i < n ? turn + i : turn + i - n;

		k &= ADDRESSES - 1;
		if (ip4) {
			at = put_head(desk, at, DNS_HEADER, TYPE_A, 4);
			put(desk, at, of->ip4[k]);
			at += 4;
		} else {
			at = put_head(desk, at, DNS_HEADER, TYPE_AAAA, 16);
			put(desk, at, (__u64)of->ip6[k].word[1] << 32 | of->ip6[k].word[0]);
			put(desk, at + 8, (__u64)of->ip6[k].word[3] << 32 | of->ip6[k].word[2]);
			at += 16;
		}
	}
	return at;
}

/* put_soa writes the zone's SOA record, as CoreDNS' kubernetes plugin has it: "ns.dns"
 * and "hostmaster" below the zone, the serial, 7200, 1800, 86400 and the TTL. */
static __always_inline __u32 put_soa(struct desk *desk, __u32 at, __u32 zone, __u32 serial)
{
	__u64 pointer = 0xc000 | zone;

	at = put_head(desk, at, zone, TYPE_SOA, 42);
	put(desk, at, 0x736e6403736e02ULL /* "\2ns\3dns" */);
	put(desk, at + 7, __builtin_bswap16(pointer) | 0x74736f680a0000ULL /* "\12host" */);
	put(desk, at + 14, 0x72657473616dULL /* "master" */ | (__u64)__builtin_bswap16(pointer) << 48);
	put(desk, at + 22, __builtin_bswap64((__u64)serial << 32 | 7200));
	put(desk, at + 30, __builtin_bswap64(1800ULL << 32 | 86400));
	put(desk, at + 38, __builtin_bswap64((__u64)ttl << 32));
	return at + 42;
}

/* write_answer makes the answer on the desk and returns its length. */
static __always_inline __u32 write_answer(struct __sk_buff *skb, __u32 message, struct desk *desk, enum outcome outcome,
					  const struct addresses *of, __u32 serial)
{
	const struct question *q = &desk->question;
	__u32 name = q->name;
	bool found = outcome == OUTCOME_ANSWERED, ip4 = q->type == TYPE_A;

	if (!between(&name, 1, WIRE_LIMIT))
		return 0;
	__u32 at = DNS_HEADER + name + 4;

	/* the question as it was asked: resolvers may compare the case (draft-vixie-dnsext-dns0x20) */
	if (bpf_skb_load_bytes(skb, message, desk->said, at))
		return 0;
	desk->said[2] = 0x84 | (desk->asked[2] & 0x01); /* QR, AA, RD as asked */
	desk->said[3] = outcome == OUTCOME_NXDOMAIN ? 3 : 0;
	desk->said[7] = found && of ? (ip4 ? of->ip4_count : of->ip6_count) : 0;
	desk->said[9] = !found;
	if (found && of)
		at = put_addresses(desk, at, of, ip4);
	else
		at = put_soa(desk, at, DNS_HEADER + q->below, serial);
	if (q->edns) {
		put(desk, at, __builtin_bswap64((__u64)TYPE_OPT << 40 | (__u64)UDP_PAYLOAD << 24));
		put(desk, at + 8, 0);
		at += OPT_LENGTH;
	}
	put(desk, at, 0); /* checksums are made of words */
	return at;
}

/* ip4_sum is the checksum of a header without options. */
static __always_inline __u16 ip4_sum(const struct ip4_header *ip)
{
	const __u16 *half = (const void *)ip;
	__u32 sum = 0;

#pragma unroll
	for (int i = 0; i < 10; i++)
		sum += half[i];
	sum = (sum & 0xffff) + (sum >> 16);
	sum = (sum & 0xffff) + (sum >> 16);
	return ~sum;
}

/* turn_round writes the headers of the answer: to whom asked, from whom was asked. */
static __always_inline bool turn_round(struct __sk_buff *skb, const struct datagram *d, __u32 length)
{
	void *data = (void *)(long)skb->data, *end = (void *)(long)skb->data_end;
	__be16 datagram = __builtin_bswap16(UDP_HEADER + length);
	struct udp_header *udp;
	__u16 *frame = data;

	if (d->ip4) {
		struct ip4_header *ip = data + ETHERNET_LENGTH;

		udp = (void *)(ip + 1);
		if ((void *)(udp + 1) > end)
			return false;
		ip->tos = 0;
		ip->length = __builtin_bswap16(sizeof(*ip) + UDP_HEADER + length);
		ip->id = 0;
		ip->fragment = __builtin_bswap16(0x4000); /* whole, and to stay so */
		ip->ttl = 64;
		ip->source = d->destination.word[3];
		ip->destination = d->source.word[3];
		ip->checksum = 0;
		ip->checksum = ip4_sum(ip);
	} else {
		struct ip6_header *ip = data + ETHERNET_LENGTH;

		udp = (void *)(ip + 1);
		if ((void *)(udp + 1) > end)
			return false;
		ip->length = datagram;
		ip->hops = 64;
		ip->source = d->destination;
		ip->destination = d->source;
	}
	udp->destination_port = udp->source_port;
	udp->source_port = __builtin_bswap16(DNS_PORT);
	udp->length = datagram;
#pragma unroll
	for (int i = 0; i < 3; i++) {
		__u16 half = frame[i];

		frame[i] = frame[i + 3];
		frame[i + 3] = half;
	}
	return true;
}

#define UDP_CHECKSUM 6

/* send makes the packet the answer on the desk. The checksum by its differences: the
 * helper knows whether the device or the program computes it, and 0 means that there
 * is none (RFC 768). Ports and addresses merely change places. */
static __always_inline bool send(struct __sk_buff *skb, const struct datagram *d, struct desk *desk, __u32 length)
{
	__u32 asked = desk->question.length, checksum = d->udp + UDP_CHECKSUM;
	__u64 lengths;
	__s64 sum;

	if (asked > QUERY_LIMIT || !between(&length, DNS_HEADER, ANSWER_LIMIT))
		return false;
	lengths = (__u64)(__u16)~__builtin_bswap16(UDP_HEADER + asked) + __builtin_bswap16(UDP_HEADER + length);
	sum = bpf_csum_diff((__be32 *)desk->asked, (asked + 3) & ~3U, NULL, 0, lengths);
	if (sum < 0)
		return false;
	sum = bpf_csum_diff(NULL, 0, (__be32 *)desk->said, (length + 3) & ~3U, sum);
	if (sum < 0)
		return false;
	return !bpf_l4_csum_replace(skb, checksum, 0, sum, BPF_F_MARK_MANGLED_0) &&
	       !bpf_l4_csum_replace(skb, checksum, 0, lengths, BPF_F_MARK_MANGLED_0 | BPF_F_PSEUDO_HDR) &&
	       !bpf_skb_store_bytes(skb, d->udp + UDP_HEADER, desk->said, length, 0) && turn_round(skb, d, length);
}

/* make_ours says that the packet is for who gets it. A query to the address of a bridge is
 * one for another host at the bridge's port, and bpf_redirect_peer let it remain so before
 * Linux 6.15, so that the pod dropped the answer. */
static __always_inline bool make_ours(struct __sk_buff *skb)
{
	return !bpf_skb_change_type(skb, PACKET_HOST);
}

/* is_heard says whether the agent was there a moment ago. */
static __always_inline bool is_heard(const struct authority *authority)
{
	return bpf_ktime_get_boot_ns() - authority->beat < silence;
}

/* decide says what is to become of the question on the desk, and what the name leads to,
 * if it is in names. */
static __always_inline enum outcome decide(struct desk *desk, const struct authority *authority, struct addresses **of)
{
	const struct question *q = &desk->question;

	if (q->below > NAME_LIMIT)
		return OUTCOME_LEFT;
	struct addresses *found = find_name(desk, 0, q->below);

	*of = found;
	if (found && found->kind != NAME_HAS)
		return OUTCOME_LEFT;
	if (found && (q->type == TYPE_A ? found->ip4_count : found->ip6_count))
		return OUTCOME_ANSWERED;
	if (!authority->whole)
		return OUTCOME_UNSURE;
	return found ? OUTCOME_NODATA : absent(desk, q);
}

/* is_same says whether what was read is still that of the name looked up: the memory of an
 * entry that is replaced may at once be another name's (since Linux 6.1). */
static __always_inline bool is_same(const struct desk *desk, const struct addresses *of)
{
	return bpf_map_lookup_elem(&names, &desk->name) == of;
}

SEC("tc")
int dns_from_pod(struct __sk_buff *skb)
{
	struct addresses *of = NULL;
	struct datagram d = {};
	__u32 zero = 0;

	if (!read_datagram(skb, &d) || !bpf_map_lookup_elem(&resolvers, &d.destination))
		return TC_ACT_UNSPEC;
	struct desk *desk = bpf_map_lookup_elem(&desks, &zero);
	const struct authority *authority = bpf_map_lookup_elem(&authorities, &zero);

	if (!desk || !authority || !d.fits)
		return pass(OUTCOME_NOT_PLAIN);
	if (!is_heard(authority))
		return pass(OUTCOME_STALE);
	__u32 outcome = read_question(skb, d.udp + UDP_HEADER, d.length);

	if (outcome != OUTCOME_COUNT)
		return pass(outcome < OUTCOME_COUNT ? outcome : OUTCOME_NOT_PLAIN);
	outcome = decide(desk, authority, &of);
	if (outcome > OUTCOME_NXDOMAIN)
		return pass(outcome);
	__u32 length = write_answer(skb, d.udp + UDP_HEADER, desk, outcome, of, authority->serial);

	if (of && !is_same(desk, of))
		return pass(OUTCOME_LEFT);
	if (!length || bpf_skb_change_tail(skb, d.udp + UDP_HEADER + length, 0))
		return pass(OUTCOME_NOT_PLAIN); /* nothing is written yet */
	if (!send(skb, &d, desk, length) || !make_ours(skb)) {
		count(OUTCOME_LOST);
		return TC_ACT_SHOT;
	}
	count(outcome);
	return bpf_redirect_peer(skb->ifindex, 0);
}

char __license[] SEC("license") = "Dual MIT/GPL";
