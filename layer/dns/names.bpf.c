//go:build ignore

// SPDX-License-Identifier: MIT OR GPL-2.0-only
/* Answers to what pods ask the cluster's DNS Service: about names of the cluster, which it
 * knows, and about others as long as it was told what is known of them.
 *
 * dns_from_pod sees what a pod sends before anybody else does. A query that it
 * understands whole, about a name whose state it knows, it turns into the answer and
 * gives back to the pod. Everything else goes its way untouched, to whoever serves
 * the Service: other types and classes, EDNS options, DO and CD, TCP, fragments, IP
 * options, names of other zones that nothing is known of, names that it was told to leave.
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
	__u16 longest; /* what the records of an answer take at most, of either family, in bytes */
	__u64 number;  /* no two entries have the same, also one after the other */
	__be32 ip4[ADDRESSES];
	struct address ip6[ADDRESSES];
};

struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__type(key, struct name);
	__type(value, struct addresses);
	/* At first, it grows: buckets that stay in a processor's cache. Entries take memory when
	 * they exist. */
	__uint(max_entries, 4096);
	__uint(map_flags, BPF_F_NO_PREALLOC);
} names SEC(".maps");

/* The addresses of the cluster's DNS Service, in any order; others are zero. */
#define RESOLVERS 16

struct resolver_list {
	struct address address[RESOLVERS];
};

struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__type(key, __u32);
	__type(value, struct resolver_list);
	__uint(max_entries, 1);
} resolvers SEC(".maps");

/* What is known of one family of a name that is not the cluster's. */
enum known_state {
	KNOWN_NOT,       /* nothing: others are asked */
	KNOWN_ADDRESSES, /* those of the entry */
	KNOWN_NODATA,    /* the name exists, and has no address of that family */
	KNOWN_ABSENT,    /* there is no such name */
};

#define RECORD_WORDS 18

struct known {
	__u64 until; /* in nanoseconds since boot: from then on it is not known any more */
	enum known_state state;
	__u8 stale;    /* no server says otherwise at the moment (RFC 8767) */
	__u8 from;     /* its records begin at this word of record; ... */
	__u8 aliases;  /* ... so many are CNAME records, ... */
	__u8 negative; /* ... and the one after them, if it is 1, is the SOA record */
};

/* A name that is not the cluster's, both families in one, so that they are of one moment.
 *
 * Records stand as in messages, each family's one after the other, with TTLs as they were
 * at since. Names in them are not compressed, but for the owners: 0xc000 and an offset,
 * from the beginning of the name; what follows its final zero is the family's records. */
struct outside_name {
	struct known known[2]; /* A, AAAA */
	__u64 since;           /* in nanoseconds since boot */
	__u64 asked;           /* when a pod asked for it last, in nanoseconds since boot, about */
	struct addresses addresses;
	__u64 record[RECORD_WORDS];
};

/* By the whole name, in the form of struct name. */
struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__type(key, struct name);
	__type(value, struct outside_name);
	__uint(max_entries, 32768); /* 512 bytes each */
	__uint(map_flags, BPF_F_NO_PREALLOC);
} outside SEC(".maps");

/* A pod's search list (resolv.conf(5)), as long as all of it fits. */
#define SUFFIXES     8
#define SUFFIX_LIMIT 64

struct suffix {
	__u64 word[SUFFIX_LIMIT / 8]; /* as in messages, in lower case, with the final zero; zeros follow */
};

struct search_list {
	__u8 ndots;
	__u8 count;
	__u8 zero[6];
	__u8 length[SUFFIXES]; /* of each, with the final zero */
	struct suffix suffix[SUFFIXES];
};

/* By the index of the pod's device at the node. A pod without an entry is answered as if
 * nothing were known of its list. */
struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__type(key, __u32);
	__type(value, struct search_list);
	__uint(max_entries, 4096);
	__uint(map_flags, BPF_F_NO_PREALLOC);
} searches SEC(".maps");

/* What the agent says of the names. */
struct authority {
	__u64 beat;     /* when it was last there, in nanoseconds since boot */
	__u64 known;    /* until then names lead to what names says, ... */
	__u64 whole;    /* ... and until then a name that is not in names does not exist */
	__u32 serial;   /* of the zone */
	__u32 complete; /* what is in names of a name is all that there is of it */
};

struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__type(key, __u32);
	__type(value, struct authority);
	__uint(max_entries, 1);
} authorities SEC(".maps");

/* A number of each table of names: odd while the agent writes it, and another one after
 * each time. A number that is even, and the same before and after, says that nothing was
 * written between. */
enum table {
	TABLE_NAMES,
	TABLE_OUTSIDE,
	TABLE_COUNT,
};

struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__type(key, __u32);
	__type(value, __u64);
	__uint(max_entries, TABLE_COUNT);
} writings SEC(".maps");

/* What became of the queries to the DNS Service. The names in metrics are read from
 * this enum's BTF, in lower case and without the prefix. */
enum outcome {
	OUTCOME_ANSWERED,         /* with addresses */
	OUTCOME_NODATA,           /* the name exists, and has no address of that family */
	OUTCOME_NXDOMAIN,         /* there is no such name */
	OUTCOME_OUTSIDE,          /* with addresses of a name that is not one of the cluster's */
	OUTCOME_OUTSIDE_NODATA,   /* such a name, which has no address of that family */
	OUTCOME_OUTSIDE_NXDOMAIN, /* such a name, which does not exist */
	OUTCOME_OUTSIDE_STALE,    /* such a name, with what was known before its servers fell silent */
	OUTCOME_COLLAPSED,        /* with what the search list comes to in the end */
	OUTCOME_NOT_PLAIN,        /* passed up: not one plain question for A or AAAA */
	OUTCOME_NOT_OURS,         /* passed up: not one of the cluster's names, and nothing is known of it now */
	OUTCOME_LEFT,             /* passed up: of the cluster, but not known here */
	OUTCOME_UNSURE,           /* passed up: not all names of the cluster are known, and this is none of them */
	OUTCOME_STALE,            /* passed up: the agent has not been heard of */
	OUTCOME_CHANGED,          /* passed up: what is known of the name was being written */
	OUTCOME_LOST,             /* dropped: the answer could not be written */
	OUTCOME_HANDED,           /* taken to the agent; what is neither replied nor back 4 s later was given up */
	OUTCOME_CROWDED,          /* passed up: too many of the pod's queries wait for the agent, or it asks again */
	OUTCOME_REPLIED,          /* of those that were taken: answered by the agent */
	OUTCOME_BACK,             /* of those that were taken: passed up after all */
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
/* How long records may be kept, in seconds. The agent changes it. */
volatile __u32 ttl = 5;
/* How long the agent may be silent, in nanoseconds. */
const volatile __u64 silence = 2000000000ULL;

#define DNS_PORT     53
#define DNS_HEADER   12
#define UDP_HEADER   8
#define QUERY_LIMIT  192 /* header, name, type, class and OPT */
#define WIRE_LIMIT   160 /* of a question's name */
#define ANSWER_LIMIT 512
#define SAID_MASK    1023
#define LABELS       16
#define OPT_LENGTH   11
#define RECORD_HEAD  12 /* owner, type, class, TTL and length */
#define ALIASES      7
/* Of what is said though it expired, in seconds (RFC 8767, 5). */
#define STALE_TTL  30
#define NAME_ERROR 3 /* "there is no such name" */
#define SECOND     1000000000ULL
#define TYPE_A     1
#define TYPE_CNAME 5
#define TYPE_SOA   6
#define TYPE_AAAA  28
#define TYPE_OPT   41
#define CLASS_IN   1
/* What an answer may have over UDP without being fragmented anywhere: what OPT says
 * that we take (https://www.dnsflagday.net/2020/). */
#define UDP_PAYLOAD 1232

/* A message's header (RFC 1035, 4.1.1). */
struct head {
	__u16 id;
	__be16 flags;
	__be16 questions;
	__be16 answers;
	__be16 authorities;
	__be16 additionals;
};

struct question {
	__u32 length; /* of the message */
	__u32 name;   /* length of its name, with the final zero */
	__u32 end;    /* what is behind it begins here in the message */
	__u16 type;
	__u8 edns;
	__u8 zero;
};

/* A name that is looked for: the question's, or what the search list makes of it. */
struct candidate {
	__u32 name;    /* its length, with the final zero */
	__u32 below;   /* length of what stands before the zone */
	__u32 labels;  /* how many of them that are */
	__u32 last;    /* offset of the last of them, ... */
	__u32 service; /* ... and of the third last */
};

/* What was found of the candidate, and what an answer of it rests on. */
struct finding {
	__u64 number;     /* of the entry; 0 if there is none */
	__u32 ttl;        /* how long it is so that the candidates before this one do not exist, in seconds */
	enum table table; /* that of the entry */
	__u16 longest;    /* as in the entry */
	__u8 is_settled;  /* it exists for both families, or for none, and not for a few seconds only */
	__u8 is_ours;     /* all that was looked at is the cluster's */
	__u8 is_alias;    /* it is not the name that was asked for */
	__u8 is_missing;  /* it rests on that a name was not found in names */
	__u8 zero[2];
};

/* What is to be said of the candidate, for the family asked for: a copy of its entry. */
struct found {
	__u64 since;                /* as in an entry of outside, ... */
	struct known known;         /* ... also this, ... */
	__u64 record[RECORD_WORDS]; /* ... and this */
	__u32 count;                /* of addresses */
	__u32 zero;
	__u64 address[2 * ADDRESSES]; /* of 4 bytes each, or of 16 */
};

struct desk {
	__u8 asked[QUERY_LIMIT + 64]; /* the query as it came */
	__u8 said[SAID_MASK + 1 + 16];
	__u8 lower[WIRE_LIMIT + NAME_LIMIT + ZONE_LIMIT]; /* the candidate in lower case, and what follows */
	__u64 now;                                        /* in nanoseconds since boot */
	__u64 writings[TABLE_COUNT];                      /* as they were then */
	struct name name;                                 /* what was looked up last, ... */
	__u32 length;                                     /* ... and its length */
	__u32 zero;
	struct finding finding;
	struct found found;
	struct question question;
	struct candidate candidate;
	struct head head; /* of the answer */
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

/* is_resolver says whether an address is one of the DNS Service's. */
static __always_inline bool is_resolver(const struct address *address)
{
	__u32 zero = 0;
	const struct resolver_list *all = bpf_map_lookup_elem(&resolvers, &zero);

	/* one word or the other is not zero in all addresses but those of no use */
	for (int i = 0; all && i < RESOLVERS && (all->address[i].word[0] | all->address[i].word[2]); i++) {
		if (address_equal(address, &all->address[i]))
			return true;
	}
	return false;
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

/* reread is a number as it is in memory. A loop to one that is in a register would leave the
 * verifier with another state for each of its ends. */
static __always_inline __u32 reread(const __u32 *number)
{
	return *(const volatile __u32 *)number;
}

/* read_name finds the end of the question's name, and puts it in lower case. False for
 * what is malformed, compressed or long. */
static __always_inline bool read_name(struct desk *desk, struct question *q)
{
	__u64 *lower = (__u64 *)desk->lower;
	__u32 at = 0;

	for (int i = 0; i < WIRE_LIMIT / 8 && 8 * i < reread(&q->length); i++)
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

/* read_zone says whether the candidate is below the zone, and finds its labels. */
static __always_inline bool read_zone(struct desk *desk, struct candidate *c)
{
	__u32 below = c->name - zone_length, at = 0, labels = 0, last = 0, second = 0, third = 0;

	if (c->name <= zone_length || below >= WIRE_LIMIT)
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
	c->below = below;
	c->labels = labels;
	c->last = last;
	c->service = third;
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

/* MASKED is a number of which no other bits are left. The verifier of Linux 6.1 forgets a
 * comparison where the compiler keeps a copy of the number on the stack; so it is masked where
 * it is used, by an instruction that the compiler cannot leave out. */
#define MASKED(number, mask)                                                                                           \
	({                                                                                                             \
		__u32 n = (number);                                                                                    \
		asm volatile("%0 &= %1" : "+r"(n) : "i"(mask));                                                        \
		n;                                                                                                     \
	})

/* SIZED is one that is not 0 either: the size of what a helper reads or writes. */
#define SIZED(number, mask) (MASKED((number)-1, mask) + 1)

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
	q->end = end;
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

	if (bpf_skb_load_bytes(skb, at, desk->asked, SIZED(length, 0xff)))
		return OUTCOME_NOT_PLAIN;
	*(__u32 *)(desk->asked + MASKED(length, 0xff)) = 0; /* checksums are made of words */
	q->length = length;
	q->edns = desk->asked[11];
	if (!has_plain_header(desk->asked) || !read_name(desk, q))
		return OUTCOME_NOT_PLAIN;
	if (!is_plain(desk, q))
		return OUTCOME_NOT_PLAIN;
	desk->candidate.name = q->name;
	desk->finding = (struct finding){ .ttl = ttl, .is_ours = true };
	return OUTCOME_COUNT;
}

/* make_key makes a key of what stands from an offset of the candidate up to another. */
static __always_inline bool make_key(struct desk *desk, __u32 from, __u32 to)
{
	if (from > to || from >= WIRE_LIMIT || to - from > NAME_LIMIT)
		return false;
	desk->length = to - from;
	for (int i = 0; i < NAME_LIMIT / 8; i++) {
		__u64 word = *(__u64 *)(desk->lower + from + 8 * i);
		__u32 length = reread(&desk->length);

		if (length <= 8 * i)
			word = 0;
		else if (length < 8 * i + 8)
			word &= (1ULL << (length - 8 * i) * 8) - 1;
		desk->name.word[i] = word;
	}
	return true;
}

/* Labels as they stand in a name, in the order of its bytes. */
#define LABEL_SVC         0x63767303ULL         /* "\3svc" */
#define LABEL_POD         0x646f7003ULL         /* "\3pod" */
#define LABEL_DNS         0x736e6403ULL         /* "\3dns" */
#define LABEL_DNS_VERSION 0x7265762d736e640bULL /* the first eight of "\13dns-version" */

/* last_label are the first bytes of the last label below the zone. */
static __always_inline __u64 last_label(const struct desk *desk, const struct candidate *c)
{
	return c->last < WIRE_LIMIT ? *(__u64 *)(desk->lower + c->last) : 0;
}

/* has_service says whether the Service is in names below which a candidate of more than
 * three labels is, as an endpoint or a port. */
static __always_inline bool has_service(struct desk *desk, const struct candidate *c)
{
	return make_key(desk, c->service, c->below) && bpf_map_lookup_elem(&names, &desk->name);
}

/* may_be_there says whether it is worth while to look for a candidate: all in names are
 * Services, and what is below one that is there (TestNamesAreOfServices). */
static __always_inline bool may_be_there(struct desk *desk, const struct candidate *c)
{
	return (last_label(desk, c) & 0xffffffff) == LABEL_SVC && (c->labels <= 3 || has_service(desk, c));
}

/* absent decides about a name that is not in names, when all are known
 * (docs/decisions/0014-dns.md has the table). An endpoint, or a port, is perhaps known to
 * whoever knows the Service's. */
static __always_inline enum outcome absent(const struct desk *desk, const struct candidate *c, bool has_service)
{
	__u64 bytes = last_label(desk, c), last = bytes & 0xffffffff;

	/* pods are not in names; the others are the server's own */
	if (last == LABEL_POD || last == LABEL_DNS || bytes == LABEL_DNS_VERSION)
		return OUTCOME_LEFT;
	if (last != LABEL_SVC || c->labels > 5)
		return OUTCOME_NXDOMAIN;
	if (c->labels < 3) /* "svc" or a namespace */
		return OUTCOME_LEFT;
	return c->labels > 3 && has_service ? OUTCOME_LEFT : OUTCOME_NXDOMAIN;
}

/* say_inside is what an entry of names says of the family asked for. */
static __always_inline enum outcome say_inside(const struct desk *desk, const struct addresses *of)
{
	if (of->kind != NAME_HAS)
		return OUTCOME_LEFT;
	return (desk->question.type == TYPE_A ? of->ip4_count : of->ip6_count) ? OUTCOME_ANSWERED : OUTCOME_NODATA;
}

/* keep_addresses copies those of the family asked for. */
static __always_inline void keep_addresses(struct desk *desk, const struct addresses *of)
{
	struct found *found = &desk->found;

	if (desk->question.type == TYPE_A) {
		const __u64 *from = (const void *)of->ip4;

		found->count = of->ip4_count;
		for (int i = 0; i < ADDRESSES / 2; i++)
			found->address[i] = from[i];
	} else {
		const __u64 *from = (const void *)of->ip6;

		found->count = of->ip6_count;
		for (int i = 0; i < 2 * ADDRESSES; i++)
			found->address[i] = from[i];
	}
}

/* is_whole says whether a name that is not in names may be said not to exist. Who goes along
 * a chain of the table while an entry of it is replaced may meet neither the old one nor the
 * new one: so no name is missing that was looked for while names are written. */
static __always_inline bool is_whole(const struct desk *desk, const struct authority *authority)
{
	return desk->now < authority->whole && !(desk->writings[TABLE_NAMES] & 1);
}

/* look_inside says what is known of a candidate below the zone. */
static __always_inline enum outcome look_inside(struct desk *desk, const struct authority *authority)
{
	const struct candidate *c = &desk->candidate;
	bool whole = is_whole(desk, authority);
	const struct addresses *of;
	enum outcome outcome;

	desk->finding.is_settled = true;
	if (c->below > NAME_LIMIT || desk->now >= authority->known)
		return OUTCOME_LEFT;
	bool there = !whole || may_be_there(desk, c);

	of = there && make_key(desk, 0, c->below) ? bpf_map_lookup_elem(&names, &desk->name) : NULL;
	if (!of) {
		desk->finding.is_missing = true;
		return whole ? absent(desk, c, there) : OUTCOME_UNSURE;
	}
	desk->finding.number = of->number;
	desk->finding.longest = of->longest;
	outcome = say_inside(desk, of);
	keep_addresses(desk, of);
	return outcome == OUTCOME_NODATA && !authority->complete ? OUTCOME_UNSURE : outcome;
}

/* is_settled says whether both families are known at the moment, and either both do not
 * exist, which a server said lately, or one has addresses. */
static __always_inline bool is_settled(const struct desk *desk, const struct outside_name *o)
{
	const struct known *a = &o->known[0], *aaaa = &o->known[1];

	if (a->until <= desk->now || aaaa->until <= desk->now || a->state == KNOWN_NOT || aaaa->state == KNOWN_NOT)
		return false;
	if (a->state == KNOWN_ABSENT && aaaa->state == KNOWN_ABSENT)
		return !a->stale && !aaaa->stale;
	return a->state != KNOWN_ABSENT && aaaa->state != KNOWN_ABSENT &&
	       (a->state == KNOWN_ADDRESSES || aaaa->state == KNOWN_ADDRESSES);
}

static __always_inline const struct known *known_of(const struct desk *desk, const struct outside_name *o)
{
	return desk->question.type == TYPE_A ? &o->known[0] : &o->known[1];
}

/* say_outside is what an entry of outside says of the family asked for. */
static __always_inline enum outcome say_outside(const struct desk *desk, const struct outside_name *o)
{
	const struct known *known = known_of(desk, o);

	if (known->until <= desk->now || known->state == KNOWN_NOT)
		return OUTCOME_NOT_OURS;
	if (known->stale)
		return OUTCOME_OUTSIDE_STALE;
	if (known->state == KNOWN_ABSENT)
		return OUTCOME_OUTSIDE_NXDOMAIN;
	return known->state == KNOWN_NODATA ? OUTCOME_OUTSIDE_NODATA : OUTCOME_OUTSIDE;
}

/* keep_outside copies what is to be said of a name outside. */
static __always_inline void keep_outside(struct desk *desk, const struct outside_name *o)
{
	struct found *found = &desk->found;

	found->known = *known_of(desk, o);
	found->since = o->since;
	if (found->known.aliases | found->known.negative)
		__builtin_memcpy(found->record, o->record, sizeof(found->record));
	keep_addresses(desk, &o->addresses);
}

/* seconds_until says how long it is until then; never too long. */
static __always_inline __u32 seconds_until(const struct desk *desk, __u64 then)
{
	return then > desk->now ? (then - desk->now) / SECOND : 0;
}

/* look_outside says what is known of a candidate that is not below the zone. */
static __always_inline enum outcome look_outside(struct desk *desk)
{
	struct finding *f = &desk->finding;
	struct outside_name *o;

	f->table = TABLE_OUTSIDE;
	f->is_ours = false;
	if (!make_key(desk, 0, desk->candidate.name - 1))
		return OUTCOME_NOT_OURS;
	o = bpf_map_lookup_elem(&outside, &desk->name);
	if (!o)
		return OUTCOME_NOT_OURS;
	f->number = o->addresses.number;
	f->longest = o->addresses.longest;
	f->is_settled = is_settled(desk, o);
	keep_outside(desk, o);
	if (desk->now - o->asked > SECOND) /* about: no two processors write it all the time */
		o->asked = desk->now;
	if (f->is_settled && o->known[0].state == KNOWN_ABSENT) {
		__u32 a = seconds_until(desk, o->known[0].until), aaaa = seconds_until(desk, o->known[1].until);

		a = a < aaaa ? a : aaaa;
		f->ttl = a < f->ttl ? a : f->ttl;
	}
	return say_outside(desk, o);
}

/* look says what is known of the candidate: an answer, or why there is none. */
__noinline enum outcome look(struct __sk_buff *skb)
{
	__u32 zero = 0;
	struct desk *desk = bpf_map_lookup_elem(&desks, &zero);
	const struct authority *authority = bpf_map_lookup_elem(&authorities, &zero);

	if (!desk || !authority || !skb)
		return OUTCOME_LEFT;
	desk->finding.number = 0;
	desk->finding.table = TABLE_NAMES;
	desk->finding.is_settled = false;
	bool inside = read_zone(desk, &desk->candidate);

	/* what it found is read anew: else the verifier follows each number of labels */
	asm volatile("" ::: "memory");
	return inside ? look_inside(desk, authority) : look_outside(desk);
}

/* find_stem is the length of what stands before the first domain of the pod's search list,
 * if that is a name for which resolvers try the list first (resolv.conf(5), ndots). */
static __always_inline __u32 find_stem(struct desk *desk, const struct search_list *list)
{
	__u32 length = list->length[0], stem = desk->question.name - length, at = 0, labels = 0;

	if (!list->count || !length || length > SUFFIX_LIMIT || length >= desk->question.name || stem >= WIRE_LIMIT)
		return 0;
	for (int i = 0; i < SUFFIX_LIMIT / 8; i++) {
		__u64 word = *(__u64 *)(desk->lower + MASKED(stem, 0xff) + 8 * i);

		if (length <= 8 * i)
			break;
		if (length < 8 * i + 8)
			word &= (1ULL << (length - 8 * i) * 8) - 1;
		if (word != list->suffix[0].word[i])
			return 0;
	}
	for (int i = 0; i < LABELS; i++) {
		if (at >= stem || at >= WIRE_LIMIT)
			break;
		at += desk->lower[at] + 1;
		labels++;
	}
	return at == stem && labels <= list->ndots ? stem : 0;
}

/* try makes the candidate what the search list's domain k makes of the stem, or after the
 * last one the stem alone, and looks. */
__noinline enum outcome try(struct __sk_buff *skb, const struct search_list *list, __u32 stem, __u32 k)
{
	__u32 zero = 0;
	struct desk *desk = bpf_map_lookup_elem(&desks, &zero);

	if (!desk || !list || !between(&stem, 1, WIRE_LIMIT))
		return OUTCOME_LEFT;
	if (k < list->count && k < SUFFIXES) {
		for (int i = 0; i < SUFFIX_LIMIT / 8; i++)
			*(__u64 *)(desk->lower + stem + 8 * i) = list->suffix[k].word[i];
		desk->candidate.name = stem + list->length[k];
	} else {
		desk->lower[stem] = 0;
		desk->candidate.name = stem + 1;
	}
	return look(skb);
}

static __always_inline bool is_absent(enum outcome outcome)
{
	return outcome == OUTCOME_NXDOMAIN || outcome == OUTCOME_OUTSIDE_NXDOMAIN;
}

/* fits says whether there is room to say of the question's name that it is the candidate:
 * for both families, or one would be answered and the other not. */
static __always_inline bool fits(const struct desk *desk)
{
	return DNS_HEADER + desk->question.name + 4 + RECORD_HEAD + desk->candidate.name + desk->finding.longest +
		   OPT_LENGTH <=
	       ANSWER_LIMIT;
}

/* collapse looks for the name that the resolver will come to in the end, when it asks for
 * its first candidate, which does not exist. A global function, so that what is around it
 * has registers enough. */
__noinline enum outcome collapse(struct __sk_buff *skb, enum outcome first)
{
	__u32 zero = 0, device = skb->ifindex;
	struct desk *desk = bpf_map_lookup_elem(&desks, &zero);
	const struct search_list *list = bpf_map_lookup_elem(&searches, &device);
	enum outcome outcome = first;

	if (!desk || !list)
		return first;
	__u32 stem = find_stem(desk, list);

	if (!stem)
		return first;
	for (int k = 1; k <= SUFFIXES; k++) {
		outcome = try(skb, list, stem, k);
		if (k >= list->count || !is_absent(outcome) || !desk->finding.is_settled)
			break;
	}
	if (outcome < OUTCOME_COLLAPSED && !is_absent(outcome) && desk->finding.is_settled && fits(desk)) {
		desk->finding.is_alias = true;
		return outcome;
	}
	desk->finding.is_ours = true;
	return try(skb, list, stem, 0);
}

/* at_most_said bounds an offset in said. No answer gets as long, but for one made of an entry
 * that is being written. */
static __always_inline __u32 at_most_said(__u32 at)
{
	return MASKED(at, SAID_MASK);
}

/* at_most_question bounds the offset of the word in which a question ends. */
static __always_inline __u32 at_most_question(__u32 at)
{
	return MASKED(at, 0xfc);
}

/* put writes eight bytes of the answer. */
static __always_inline void put(struct desk *desk, __u32 at, __u64 bytes)
{
	*(__u64 *)(desk->said + at_most_said(at)) = bytes;
}

/* put_head writes a record's owner (by a pointer to an offset), type, class, TTL and the
 * length of what follows. */
static __always_inline __u32 put_head(struct desk *desk, __u32 at, __u32 owner, __u16 type, __u32 seconds, __u16 length)
{
	put(desk, at,
	    __builtin_bswap64((0xc000ULL | owner) << 48 | (__u64)type << 32 | (__u64)CLASS_IN << 16 | seconds >> 16));
	put(desk, at + 8, __builtin_bswap64((__u64)(seconds & 0xffff) << 48 | (__u64)length << 32));
	return at + RECORD_HEAD;
}

/* put_addresses writes the records of the addresses that were found, beginning with any of
 * them, so that who takes the first takes another one each time. A global function, so that
 * it is verified once. */
__noinline __u32 put_addresses(__u32 at, __u32 owner, __u32 seconds)
{
	__u32 zero = 0;
	struct desk *desk = bpf_map_lookup_elem(&desks, &zero);

	if (!desk)
		return 0;
	bool ip4 = desk->question.type == TYPE_A;
	__u32 n = desk->found.count;
	const __be32 *ip4s = (const void *)desk->found.address;

	if (!n || n > ADDRESSES)
		return at;
	__u32 turn = n > 1 ? bpf_get_prandom_u32() % n : 0;

	for (int i = 0; i < ADDRESSES; i++) {
		if (i >= n)
			break;
		__u32 k = turn + i < n ? turn + i : turn + i - n;

		k &= ADDRESSES - 1;
		if (ip4) {
			at = put_head(desk, at, owner, TYPE_A, seconds, 4);
			put(desk, at, ip4s[k]);
			at += 4;
		} else {
			at = put_head(desk, at, owner, TYPE_AAAA, seconds, 16);
			put(desk, at, desk->found.address[2 * k]);
			put(desk, at + 8, desk->found.address[2 * k + 1]);
			at += 16;
		}
	}
	return at;
}

/* The most that the SOA record itself may be kept, in seconds (CoreDNS, plugin.SOA). */
#define SOA_TTL 300

/* put_soa writes the zone's SOA record, as CoreDNS' kubernetes plugin has it: "ns.dns"
 * and "hostmaster" below the zone, the serial, 7200, 1800, 86400 and the TTL. */
static __always_inline __u32 put_soa(struct desk *desk, __u32 at, __u32 zone, __u32 serial)
{
	__u64 pointer = 0xc000 | zone;

	at = put_head(desk, at, zone, TYPE_SOA, ttl < SOA_TTL ? ttl : SOA_TTL, 42);
	put(desk, at, 0x736e6403736e02ULL /* "\2ns\3dns" */);
	put(desk, at + 7, __builtin_bswap16(pointer) | 0x74736f680a0000ULL /* "\12host" */);
	put(desk, at + 14, 0x72657473616dULL /* "master" */ | (__u64)__builtin_bswap16(pointer) << 48);
	put(desk, at + 22, __builtin_bswap64((__u64)serial << 32 | 7200));
	put(desk, at + 30, __builtin_bswap64(1800ULL << 32 | 86400));
	put(desk, at + 38, __builtin_bswap64((__u64)ttl << 32));
	return at + 42;
}

/* put_alias says that what was asked for is the candidate. */
static __always_inline __u32 put_alias(struct desk *desk, __u32 at)
{
	__u32 length = desk->candidate.name;

	at = put_head(desk, at, DNS_HEADER, TYPE_CNAME, desk->finding.ttl, length);
	for (__u32 i = 0; i < WIRE_LIMIT && i < reread(&desk->candidate.name); i += 8)
		put(desk, at + i, *(__u64 *)(desk->lower + i));
	return at + length;
}

/* settle_record makes a record of outside one of this message: its owner, which is counted
 * from the candidate's name, and what is left of its TTL. */
static __always_inline void settle_record(struct desk *desk, __u32 record, __u32 owner, __u32 first, __u32 passed,
					  bool stale)
{
	__u8 *at = desk->said + at_most_said(record);
	__u32 offset = number_at(at) & 0x3fff, name = desk->candidate.name;
	__u32 seconds = (__u32)number_at(at + 6) << 16 | number_at(at + 8);

	offset = 0xc000 | (offset < name ? owner + offset : first + offset - name);
	at[0] = offset >> 8;
	at[1] = offset;
	seconds = stale ? STALE_TTL : seconds > passed ? seconds - passed : 0;
	at[6] = seconds >> 24;
	at[7] = seconds >> 16;
	at[8] = seconds >> 8;
	at[9] = seconds;
}

/* put_records writes the aliases of a name outside and its SOA record, if there are any.
 * What the last alias leads to is at *owner then. */
static __always_inline __u32 put_records(struct desk *desk, __u32 at, __u32 *owner)
{
	const struct found *found = &desk->found;
	const struct known *known = &found->known;
	__u32 n = known->aliases + known->negative, name = *owner, first = at;
	__u32 passed = desk->now > found->since ? (desk->now - found->since) / SECOND : 0;

	if (!n)
		return at;
	for (int i = 0; i < RECORD_WORDS; i++) {
		__u32 from = known->from + i;

		if (!between(&from, 0, RECORD_WORDS - 1))
			break;
		put(desk, at + 8 * i, found->record[from]);
	}
	for (int i = 0; i < ALIASES + 1; i++) {
		if (i >= n)
			break;
		settle_record(desk, at, name, first, passed, known->stale);
		*owner = at + RECORD_HEAD;
		at += RECORD_HEAD + number_at(desk->said + at_most_said(at) + 10);
	}
	return at;
}

/* put_counts writes the header's flags and code, and how many records there are. */
static __always_inline void put_counts(struct desk *desk, __u32 code, __u32 answers, __u32 authorities)
{
	__u32 flags = 0x8000 | (desk->finding.is_ours ? 0x0400 : 0x0080); /* QR, and AA or RA */

	flags |= (desk->asked[2] & 0x01) << 8 | code; /* RD as asked */
	desk->head.flags = __builtin_bswap16(flags);
	desk->head.answers = __builtin_bswap16(answers + desk->finding.is_alias);
	desk->head.authorities = __builtin_bswap16(authorities);
}

/* number_of is that of a table now. */
static __always_inline __u64 number_of(enum table table)
{
	__u32 key = table;
	const __u64 *number = bpf_map_lookup_elem(&writings, &key);

	return number ? *number : 1;
}

/* is_quiet says whether a table has not been written since the query came: then what was
 * found in it is so, and what was not is not there. */
static __always_inline bool is_quiet(const struct desk *desk, enum table table)
{
	return !(desk->writings[table] & 1) && number_of(table) == desk->writings[table];
}

/* The memory of an entry that is replaced may at once be another one's (since Linux 6.1),
 * which is being written while this reads. No two entries have the same number. So one that
 * is found under its name with the same number before and after is the same all the time,
 * and what was decided before, when it may not have been, is decided again. */

/* find_outside_again says whether the name outside that was found is still so, and takes it
 * anew. */
static __always_inline bool find_outside_again(struct desk *desk, enum outcome outcome)
{
	const struct finding *f = &desk->finding;
	const struct outside_name *o = bpf_map_lookup_elem(&outside, &desk->name);

	if (!o || o->addresses.number != f->number || say_outside(desk, o) != outcome ||
	    o->addresses.longest != f->longest || (f->is_alias && !is_settled(desk, o)))
		return false;
	keep_outside(desk, o);
	o = bpf_map_lookup_elem(&outside, &desk->name);
	return o && o->addresses.number == f->number;
}

/* find_inside_again is the same for a name of the cluster. */
static __always_inline bool find_inside_again(struct desk *desk, enum outcome outcome)
{
	const struct finding *f = &desk->finding;
	const struct addresses *of = bpf_map_lookup_elem(&names, &desk->name);

	if (!of || of->number != f->number || of->longest != f->longest || say_inside(desk, of) != outcome)
		return false;
	keep_addresses(desk, of);
	of = bpf_map_lookup_elem(&names, &desk->name);
	return of && of->number == f->number;
}

/* find_again is either of them. A global function, so that it is out of the way. */
__noinline int find_again(struct __sk_buff *skb, enum outcome outcome)
{
	__u32 zero = 0;
	struct desk *desk = bpf_map_lookup_elem(&desks, &zero);

	if (!desk || !skb)
		return false;
	return desk->finding.table == TABLE_OUTSIDE ? find_outside_again(desk, outcome)
						    : find_inside_again(desk, outcome);
}

/* is_still_so says whether what was found, or was not, holds although the agent may have
 * written meanwhile. */
static __always_inline bool is_still_so(struct __sk_buff *skb, const struct desk *desk, enum outcome outcome)
{
	const struct finding *f = &desk->finding;
	bool quiet = is_quiet(desk, TABLE_NAMES);

	if (f->is_missing && !quiet)
		return false;
	if (f->table == TABLE_OUTSIDE)
		quiet = is_quiet(desk, TABLE_OUTSIDE);
	return quiet || !f->number || find_again(skb, outcome);
}

/* put_outside writes what is known of the name outside that was found. */
static __always_inline __u32 put_outside(struct desk *desk, __u32 at, __u32 owner)
{
	const struct known *known = &desk->found.known;
	bool found = known->state == KNOWN_ADDRESSES;

	put_counts(desk, known->state == KNOWN_ABSENT ? NAME_ERROR : 0,
		   known->aliases + (found ? desk->found.count : 0), known->negative);
	at = put_records(desk, at, &owner);
	if (!found || !at)
		return at;
	return put_addresses(at, owner, known->stale ? STALE_TTL : seconds_until(desk, known->until));
}

/* put_zone writes the zone's SOA record: of a name that has no address of the family asked
 * for, or that does not exist. */
static __always_inline __u32 put_zone(struct desk *desk, __u32 at, __u32 owner, __u32 code, __u32 serial)
{
	put_counts(desk, code, 0, 1);
	return put_soa(desk, at, owner + desk->candidate.below, serial);
}

/* write_answer writes on the desk what stands in the answer behind the question, at its place,
 * and returns the answer's length; 0 if there is none, for what is known changed meanwhile. */
__noinline __u32 write_answer(struct __sk_buff *skb, enum outcome outcome)
{
	__u32 zero = 0;
	struct desk *desk = bpf_map_lookup_elem(&desks, &zero);
	const struct authority *authority = bpf_map_lookup_elem(&authorities, &zero);

	if (!desk || !authority || !skb || !is_still_so(skb, desk, outcome))
		return 0;
	__u32 at = desk->question.end, owner = DNS_HEADER;

	if (!between(&at, DNS_HEADER + 5, QUERY_LIMIT))
		return 0;
	/* checksums are made of words: that in which the question ends is whole */
	put(desk, at & ~3U, *(__u32 *)(desk->asked + at_most_question(at)));
	if (desk->finding.is_alias) {
		owner = at + RECORD_HEAD;
		at = put_alias(desk, at);
	}
	if (!desk->finding.number) {
		at = put_zone(desk, at, owner, NAME_ERROR, authority->serial);
	} else if (desk->finding.table == TABLE_OUTSIDE) {
		at = put_outside(desk, at, owner);
	} else if (outcome == OUTCOME_ANSWERED) {
		put_counts(desk, 0, desk->found.count, 0);
		at = put_addresses(at, owner, ttl);
	} else {
		at = put_zone(desk, at, owner, 0, authority->serial);
	}
	if (desk->question.edns) {
		put(desk, at, __builtin_bswap64((__u64)TYPE_OPT << 40 | (__u64)UDP_PAYLOAD << 24));
		put(desk, at + 8, 0);
		at += OPT_LENGTH;
	}
	put(desk, at, 0);
	return at <= ANSWER_LIMIT ? at : 0;
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
static __always_inline bool turn_round(struct __sk_buff *skb, const struct datagram *d, const struct head *said,
				       __u32 length)
{
	void *data = (void *)(long)skb->data, *end = (void *)(long)skb->data_end;
	__be16 datagram = __builtin_bswap16(UDP_HEADER + length);
	struct udp_header *udp;
	__u16 *frame = data;
	struct head *head;

	if (d->ip4) {
		struct ip4_header *ip = data + ETHERNET_LENGTH;

		udp = (void *)(ip + 1);
		head = (void *)(udp + 1);
		if ((void *)(head + 1) > end)
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
		head = (void *)(udp + 1);
		if ((void *)(head + 1) > end)
			return false;
		ip->length = datagram;
		ip->hops = 64;
		ip->source = d->destination;
		ip->destination = d->source;
	}
	udp->destination_port = udp->source_port;
	udp->source_port = __builtin_bswap16(DNS_PORT);
	udp->length = datagram;
	head->flags = said->flags;
	head->answers = said->answers;
	head->authorities = said->authorities;
#pragma unroll
	for (int i = 0; i < 3; i++) {
		__u16 half = frame[i];

		frame[i] = frame[i + 3];
		frame[i + 3] = half;
	}
	return true;
}

#define UDP_CHECKSUM 6

/* sum_of is the difference that the answer makes to a sum over the message: in its head,
 * where a query has no answers and authorities, and from the word in which the question ends. */
static __always_inline __s64 sum_of(struct desk *desk, __u32 same, __u32 length, __u32 sum)
{
	const struct head *asked = (const void *)desk->asked, *said = &desk->head;
	__u32 before = desk->question.length + 3 - same, after = length + 3 - same;

	sum += (__u16)~asked->flags + said->flags + said->answers + said->authorities;
	return bpf_csum_diff((__be32 *)(desk->asked + at_most_question(same)), MASKED(before, 0x1c),
			     (__be32 *)(desk->said + at_most_question(same)), MASKED(after, 0x3fc), sum);
}

/* send makes the packet the answer on the desk. The question stays as it was asked: resolvers
 * may compare the case (draft-vixie-dnsext-dns0x20). The checksum by its differences: the
 * helper knows whether the device or the program computes it, and 0 means that there
 * is none (RFC 768). Ports and addresses merely change places. */
static __always_inline bool send(struct __sk_buff *skb, const struct datagram *d, struct desk *desk, __u32 length)
{
	__u32 same = at_most_question(desk->question.end), tail = length - same, checksum = d->udp + UDP_CHECKSUM,
	      lengths;
	__s64 sum;

	lengths = (__u16)~__builtin_bswap16(UDP_HEADER + desk->question.length);
	lengths += __builtin_bswap16(UDP_HEADER + length);
	sum = sum_of(desk, same, length, lengths);
	if (sum < 0 || !between(&tail, 1, ANSWER_LIMIT))
		return false;
	return !bpf_l4_csum_replace(skb, checksum, 0, sum, BPF_F_MARK_MANGLED_0) &&
	       !bpf_l4_csum_replace(skb, checksum, 0, lengths, BPF_F_MARK_MANGLED_0 | BPF_F_PSEUDO_HDR) &&
	       !bpf_skb_store_bytes(skb, d->udp + UDP_HEADER + same, desk->said + at_most_question(same),
				    SIZED(tail, 0x1ff), 0) &&
	       turn_round(skb, d, &desk->head, length);
}

/* make_ours says that the packet is for who gets it. A query to the address of a bridge is
 * one for another host at the bridge's port, and bpf_redirect_peer let it remain so before
 * Linux 6.15, so that the pod dropped the answer. */
static __always_inline bool make_ours(struct __sk_buff *skb)
{
	return skb->pkt_type == PACKET_HOST || !bpf_skb_change_type(skb, PACKET_HOST);
}

/* is_heard says whether the agent was there a moment ago. */
static __always_inline bool is_heard(const struct authority *authority, __u64 now)
{
	return now < authority->beat + silence;
}

#include "waiting.h"

SEC("tc")
int dns_from_pod(struct __sk_buff *skb)
{
	struct datagram d = {};
	__u32 zero = 0;

	if (is_given_back(skb))
		return given_back(skb);
	if (!read_datagram(skb, &d) || !is_resolver(&d.destination))
		return TC_ACT_UNSPEC;
	struct desk *desk = bpf_map_lookup_elem(&desks, &zero);
	const struct authority *authority = bpf_map_lookup_elem(&authorities, &zero);

	if (!desk || !authority || !d.fits)
		return pass(OUTCOME_NOT_PLAIN);
	desk->now = bpf_ktime_get_boot_ns();
	desk->writings[TABLE_NAMES] = number_of(TABLE_NAMES);
	desk->writings[TABLE_OUTSIDE] = number_of(TABLE_OUTSIDE);
	if (!is_heard(authority, desk->now) && desk->now >= authority->known)
		return pass(OUTCOME_STALE);
	__u32 outcome = read_question(skb, d.udp + UDP_HEADER, d.length);

	if (outcome != OUTCOME_COUNT)
		return leave(skb, &d, OUTCOME_NOT_PLAIN);
	outcome = look(skb);
	if (is_absent(outcome) && desk->finding.is_settled)
		outcome = collapse(skb, outcome);
	if (outcome >= OUTCOME_COLLAPSED)
		return leave(skb, &d, outcome < OUTCOME_COUNT ? outcome : OUTCOME_LEFT);
	__u32 length = write_answer(skb, outcome);

	if (!length)
		return leave(skb, &d, OUTCOME_CHANGED);
	if (bpf_skb_change_tail(skb, d.udp + UDP_HEADER + length, 0))
		return pass(OUTCOME_NOT_PLAIN); /* nothing is written yet */
	if (!send(skb, &d, desk, length) || !make_ours(skb)) {
		count(OUTCOME_LOST);
		return TC_ACT_SHOT;
	}
	count(desk->finding.is_alias ? OUTCOME_COLLAPSED : outcome);
	return bpf_redirect_peer(skb->ifindex, 0);
}

char __license[] SEC("license") = "Dual MIT/GPL";
