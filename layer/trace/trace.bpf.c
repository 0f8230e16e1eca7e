//go:build ignore

// SPDX-License-Identifier: MIT OR GPL-2.0-only
/* What happens to packets and connections, from stable tracepoints: each program is
 * loaded by itself, so that a kernel without one of them gives the others.
 *
 * Everything is counted here, by a key that leaves out the client's port; user space
 * gets one example of each new key, at a limited rate. A storm of drops costs a look
 * into a hash map for each, and no event of it is sent.
 */
#include "../../bpf/address.h"
#include "../../bpf/kernel.h"

/* What kind of event it is; cause.Kind. */
enum kind {
	KIND_NONE,
	KIND_DROP,
	KIND_RESET,
	KIND_ICMP,
	KIND_RETRANSMIT,
	KIND_SOCKET_ERROR,
	KIND_NEIGHBOUR,
	KIND_FULL,
	KIND_CALL,
	KIND_CHECKSUM,
	KIND_STATE,
	KIND_SYNACK, /* also a retransmission; a program of its own has a scratch of its own */
	KIND_UDP_FULL,
	KINDS,
};

/* Totals are kept apart for so many reasons; Linux 6.18 has 130. */
#define REASONS 256

enum {                       /* of struct event_key.flags, beside those of TCP */
       FLAG_SOURCE = 0x40,   /* port is the source's */
       FLAG_FRAGMENT = 0x80, /* not the first of a packet */
};

struct event_key {
	struct address source;
	struct address destination;
	__u64 location; /* who dropped it; of a call its number; of a reset whether it has crossed data */
	__u32 netns;
	__u32 reason; /* of a drop or reset; else errno, ICMP's type and code, or the states before and after */
	__u32 ifindex;
	__be16 ethertype;
	__be16 port; /* the service's; of ICMP its type and code */
	__u8 kind;   /* enum kind */
	__u8 protocol;
	__u8 flags;
	__u8 zero;
	__u32 cookie; /* lower half of the namespace's: another one may get the inode */
};

struct event {
	__u64 count;
	__u64 first;
	__u64 last;
	__u64 socket;
	__u32 longest;
	__be16 source_port;
	__be16 destination_port;
	char device[16];
};

#define STACK_DEPTH  28
#define HEADER_LIMIT 128
/* What an example holds of a packet: the whole of it, where its checksums may be
 * looked at; else its beginning. */
#define WHOLE_LIMIT 2048
#define PART_LIMIT  256

struct example {
	struct event_key key;
	__be16 source_port;
	__be16 destination_port;
	__u32 length;   /* of the whole packet from its network header on */
	__u32 captured; /* bytes from skb->data on, which follow this structure */
	__s32 before;   /* how far before skb->data the network header is; < 0: behind it */
	__u32 headers;  /* bytes in header, which are those from the network header to skb->data */
	__u32 pid;
	__u64 socket;
	__u64 when;
	__u16 gso;
	__u8 mac[6];
	__u8 packet_type;
	__u8 summed;
	__u8 retransmits;
	__u8 asked;
	__u8 zero[4];
	__s32 stack_bytes;
	__u32 zero2;
	char command[16];
	char device[16];
	__u64 stack[STACK_DEPTH];
	__u8 header[HEADER_LIMIT];
};

/* One reading of a packet or a socket. */
struct subject {
	struct event_key key;
	struct sk_buff *skb;
	struct net_device *dev;
	__u64 socket;
	__u32 length;
	__u32 network; /* offset of the network header from skb->head */
	__be16 source_port;
	__be16 destination_port;
	__u8 retransmits;
	bool asked;
	bool often; /* its like was met often before */
	bool many;  /* it comes with others, which have been counted */
};

/* A range of addresses: of both families, by IPv6's bits. */
struct range {
	__u32 length;
	struct address address;
};

enum { SIDE_FROM = 1, SIDE_TO = 2 };

/* Which side of the packets that are asked for a range is of, with the ports there; 0 for
 * any port. */
struct side {
	__be16 from_port;
	__be16 to_port;
	__u8 of;
	__u8 zero[3];
};

/* A step of a filter. Tests put an answer down; and, or and not take theirs from there. */
enum test {
	TEST_NONE,
	TEST_AND,
	TEST_OR,
	TEST_NOT,
	TEST_ETHERTYPE, /* low, as it is in the packet */
	TEST_PROTOCOL,  /* low */
	TEST_FLAGS,     /* of TCP: those in low are those in high */
	TEST_SOURCE,    /* address, as far as mask */
	TEST_DESTINATION,
	TEST_SOURCE_PORT, /* low to high */
	TEST_DESTINATION_PORT,
};

#define STEPS 64 /* of a filter */

struct step {
	enum test test;
	__u16 low;
	__u16 high;
	struct address address;
	struct address mask;
};

/* Packets that died in a namespace of a reason. */
struct share_key {
	__u32 netns;
	__u32 reason;
};

/* Whose TCP connections have ended: a client's and a port's of a server, as one of them
 * has seen them. */
struct flow_key {
	struct address client;
	struct address server;
	__u32 netns;
	__be16 port; /* the server's */
	__u8 of_client;
	__u8 zero;
};

struct flow {
	__u64 ended[4]; /* by enum ending */
	__u64 sent;     /* bytes that the other end acknowledged */
	__u64 received;
	__u64 retransmits;
	__u64 last;
	__u32 longest_rtt; /* smoothed, in microseconds */
	__u32 zero;
};

/* What dies again and again on a processor: the last kind of it, and how many of these are
 * not in the tables yet. */
struct storm {
	struct event_key key;
	__u64 count;
	__u64 turns; /* grows by two when they are put there, or the kind is another; odd meanwhile */
};

struct budget {
	__u64 since;
	__u64 used;
};

/* Where a packet is seen that goes on. */
enum point {
	POINT_CAME,   /* it has come by a device */
	POINT_QUEUED, /* it is given to a device's queue */
	POINT_LEFT,   /* the device is given it */
};

struct spot {
	__u32 netns;
	__u32 ifindex;
	enum point point;
};

/* A port at which a namespace has accepted a connection. */
struct server_key {
	__u32 netns;
	__be16 port;
	__u16 zero;
};

/* A packet on its way: where and when it was seen last. */
struct flight {
	__u64 at;
	struct spot spot;
	__u32 mark;
};

struct hop_key {
	struct spot from;
	struct spot to;
};

struct hop {
	__u64 count;
	__u64 total; /* nanoseconds */
	__u64 longest;
};

/* Whom we look at: inodes of network namespaces. */
struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__type(key, __u32);
	__type(value, __u8);
	__uint(max_entries, 16384);
	__uint(map_flags, BPF_F_NO_PREALLOC);
} wanted SEC(".maps");

/* What happened, by what; what was not met for long is forgotten when it is full. */
struct {
	__uint(type, BPF_MAP_TYPE_LRU_PERCPU_HASH);
	__type(key, struct event_key);
	__type(value, struct event);
	__uint(max_entries, 8192);
} events SEC(".maps");

/* What happened to packets that were not asked for, likewise: they may be the cause of
 * what happened to the others, and are not to push them out. */
struct {
	__uint(type, BPF_MAP_TYPE_LRU_PERCPU_HASH);
	__type(key, struct event_key);
	__type(value, struct event);
	__uint(max_entries, 8192);
} beside SEC(".maps");

/* Whose packets are asked for. What holds a longer range holds what its shorter ones do. */
struct {
	__uint(type, BPF_MAP_TYPE_LPM_TRIE);
	__type(key, struct range);
	__type(value, struct side);
	__uint(max_entries, 4096);
	__uint(map_flags, BPF_F_NO_PREALLOC);
} sides SEC(".maps");

/* Totals, which nothing is lost of: REASONS numbers for each kind, of drops and resets
 * by reason. The last one holds reasons of a higher number. */
struct {
	__uint(type, BPF_MAP_TYPE_PERCPU_ARRAY);
	__type(key, __u32);
	__type(value, __u64);
	__uint(max_entries, KINDS *REASONS);
} totals SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_PERF_EVENT_ARRAY);
	__uint(key_size, sizeof(__u32));
	__uint(value_size, sizeof(__u32));
} examples SEC(".maps");

/* A program does not interrupt itself on a processor, but another one may. */
struct {
	__uint(type, BPF_MAP_TYPE_PERCPU_ARRAY);
	__type(key, enum kind);
	__type(value, struct example);
	__uint(max_entries, KINDS);
} drafts SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_PERCPU_ARRAY);
	__type(key, __u32);
	__type(value, struct budget);
	__uint(max_entries, 2 * KINDS); /* behind the first half are those of what was not asked for */
} budgets SEC(".maps");

/* The last examples of each kind, for who looks later. */
#define KEPT 16

struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__type(key, __u32);
	__type(value, struct example);
	__uint(max_entries, KINDS *KEPT);
} recent SEC(".maps");

/* How many examples of each kind were kept until now. */
struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__type(key, __u32);
	__type(value, __u64);
	__uint(max_entries, KINDS);
} turns SEC(".maps");

/* Drops by namespace and reason. Those of namespaces that have gone make room; the totals keep
 * them. */
struct {
	__uint(type, BPF_MAP_TYPE_LRU_PERCPU_HASH);
	__type(key, struct share_key);
	__type(value, __u64);
	__uint(max_entries, 2048);
} shares SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_LRU_HASH);
	__type(key, struct flow_key);
	__type(value, struct flow);
	__uint(max_entries, 8192);
} flows SEC(".maps");

/* Ports of servers: a connection of such a port is one that was accepted there. A listener
 * that has gone leaves it, for its connections end later. */
struct {
	__uint(type, BPF_MAP_TYPE_LRU_HASH);
	__type(key, struct server_key);
	__type(value, __u8);
	__uint(max_entries, 8192);
} servers SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_PERCPU_ARRAY);
	__type(key, __u32);
	__type(value, struct storm);
	__uint(max_entries, 1);
} storms SEC(".maps");

/* Packets that are asked for and on their way, by their address in memory. */
struct {
	__uint(type, BPF_MAP_TYPE_LRU_HASH);
	__type(key, __u64);
	__type(value, struct flight);
	__uint(max_entries, 4096);
} flights SEC(".maps");

/* How long they took from one place to the next. */
struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__type(key, struct hop_key);
	__type(value, struct hop);
	__uint(max_entries, 512);
} hops SEC(".maps");

/* How connections have ended. */
enum ending {
	ENDING_ANY,
	ENDING_REFUSED,    /* the server said that nobody listens */
	ENDING_UNANSWERED, /* no answer to the first packet, or none any more */
	ENDING_RESET,
	ENDINGS,
};

/* How many connections have ended, those too of which flows has forgotten. */
struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__type(key, enum ending);
	__type(value, __u64);
	__uint(max_entries, ENDINGS);
} ended SEC(".maps");

/* Set before load. Which arguments the tracepoints of the running kernel have: their
 * place, or -1. */
const volatile __s32 drop_reason = -1;
const volatile __s32 drop_receiver = -1;
const volatile __s32 reset_reason = -1;
/* Only the namespaces in wanted. */
const volatile bool chosen = false;
/* How many ends of packets were named: 0 asks for all, 1 for those of or to one end, 2
 * for those between two. */
const volatile __u8 ends = 0;
/* What of these is asked for: no steps ask for all. */
const volatile struct step filter[STEPS] = {};
const volatile __u32 filter_steps = 0;
/* Send every packet that died and was asked for, as far as the budget reaches. */
const volatile bool packets = false;
/* Keep the last examples in the kernel, and count by namespace: nobody waits for them. */
const volatile bool keeps = false;
/* Send every drop to user space, and count nothing: what a tracer costs that does so (bench). */
const volatile bool each = false;
/* Examples that a program may send in a second on one processor. */
const volatile __u32 examples_a_second = 256;
/* Numbers of the system calls, which depend on the architecture. */
const volatile __u32 call_connect = 0;
const volatile __u32 call_bind = 0;
const volatile __u32 call_sendto = 0;
const volatile __u32 call_sendmsg = 0;
const volatile __u32 call_sendmmsg = 0;
const volatile __u32 call_write = 0;
const volatile __u32 call_writev = 0;

/* Inode numbers of namespaces begin here (PROC_DYNAMIC_FIRST, less the fixed ones of
 * the first namespaces, linux/nsfs.h). What is lower was read from something that is
 * no namespace: fields of a dead packet are used for other things. */
#define LEAST_INODE 0xeffffff0U

#define ETHERTYPE_IP4    0x0008 /* in network byte order */
#define ETHERTYPE_IP6    0xdd86
#define ETHERTYPE_ARP    0x0608
#define UNSET            0xffff
#define SECOND           1000000000ULL
#define NEIGHBOUR_FAILED 0x20 /* NUD_FAILED */
#define TYPE_OF_FILE     0170000
#define SOCKET_FILE      0140000

enum {
	IPPROTO_ICMP = 1,
	IPPROTO_TCP = 6,
	IPPROTO_UDP = 17,
	IPPROTO_ICMPV6 = 58,
	IPPROTO_UDPLITE = 136,
	IPPROTO_SCTP = 132,
	IPPROTO_DCCP = 33,
};

enum {
	TCP_FIN = 0x01,
	TCP_SYN = 0x02,
	TCP_RST = 0x04,
	TCP_ACK = 0x10,
	FLAGS_OF_TCP = TCP_FIN | TCP_SYN | TCP_RST | TCP_ACK,
};

enum { /* net/tcp_states.h */
       STATE_ESTABLISHED = 1,
       STATE_SYN_SENT = 2,
       STATE_SYN_RECV = 3,
       STATE_CLOSE = 7,
       STATE_LISTEN = 10,
       STATE_NEW_SYN_RECV = 12,
};

static __always_inline __u16 host16(__be16 value)
{
	return __builtin_bswap16(value);
}

static __always_inline bool looked_at(__u32 netns)
{
	return netns >= LEAST_INODE && (!chosen || bpf_map_lookup_elem(&wanted, &netns));
}

/* place_in takes down the namespace, and says whether it is looked at. */
static __always_inline bool place_in(struct subject *s, const struct net *net)
{
	s->key.netns = net->ns.inum;
	if (bpf_core_field_exists(net->net_cookie))
		s->key.cookie = net->net_cookie;
	return looked_at(s->key.netns);
}

/* is_of_source says which of two ports is not the client's: what a SYN goes to, else the
 * lower one. */
static __always_inline bool is_of_source(__u8 protocol, __u8 flags, __be16 source, __be16 destination)
{
	__u8 opening = flags & (TCP_SYN | TCP_ACK);

	if (protocol == IPPROTO_TCP && opening == TCP_SYN)
		return false;
	if (protocol == IPPROTO_TCP && opening == (TCP_SYN | TCP_ACK))
		return true;
	return host16(source) < host16(destination);
}

static __always_inline void choose_port(struct subject *s)
{
	bool of_source = is_of_source(s->key.protocol, s->key.flags, s->source_port, s->destination_port);

	s->key.port = of_source ? s->source_port : s->destination_port;
	if (of_source)
		s->key.flags |= FLAG_SOURCE;
}

static __always_inline bool has_ports(__u8 protocol)
{
	return protocol == IPPROTO_TCP || protocol == IPPROTO_UDP || protocol == IPPROTO_SCTP ||
	       protocol == IPPROTO_UDPLITE || protocol == IPPROTO_DCCP;
}

/* What is read of a packet at once: an IP header without options, and what of the
 * next one is of interest. */
#define FIRST_READ 60

struct headers {
	__u8 byte[FIRST_READ + 4];
	__u32 length; /* of what was read */
};

static __always_inline void read_headers(struct headers *h, const unsigned char *head, __u32 at, __u32 tail)
{
	__u32 length = tail - at;

	h->length = 0;
	if (at >= tail)
		return;
	if (length > FIRST_READ)
		length = FIRST_READ;
	if (!bpf_probe_read_kernel(h->byte, length, head + at))
		h->length = length;
}

/* take_ports takes what of the transport header was read: its first 4 bytes, and the
 * flags of TCP. */
static __always_inline void take_ports(struct subject *s, const __u8 *l4, bool flags)
{
	if (s->key.protocol == IPPROTO_ICMP || s->key.protocol == IPPROTO_ICMPV6) {
		s->key.port = l4[0] | l4[1] << 8;
		return;
	}
	if (!has_ports(s->key.protocol))
		return;
	s->source_port = l4[0] | l4[1] << 8;
	s->destination_port = l4[2] | l4[3] << 8;
	if (flags && s->key.protocol == IPPROTO_TCP)
		s->key.flags |= l4[13] & FLAGS_OF_TCP;
	choose_port(s);
}

/* read_transport reads what follows IP options and extension headers. */
static __always_inline void read_transport(struct subject *s, const unsigned char *head, __u32 at, __u32 tail)
{
	__u8 l4[14] = {};

	if (at + sizeof(l4) <= tail) {
		bpf_probe_read_kernel(l4, sizeof(l4), head + at);
		take_ports(s, l4, true);
	} else if (at + 4 <= tail) {
		bpf_probe_read_kernel(l4, 4, head + at);
		take_ports(s, l4, false);
	}
}

static __always_inline void read_ip4(struct subject *s, const struct headers *h, const unsigned char *head, __u32 at,
				     __u32 tail)
{
	if (h->length < 20)
		return;
	s->key.source = address_from_ip4(*(const __be32 *)(h->byte + 12));
	s->key.destination = address_from_ip4(*(const __be32 *)(h->byte + 16));
	s->key.protocol = h->byte[9];
	if ((h->byte[6] << 8 | h->byte[7]) & 0x1fff)
		s->key.flags |= FLAG_FRAGMENT;
	else if (h->byte[0] != 0x45)
		read_transport(s, head, at + (h->byte[0] & 0x0f) * 4, tail);
	else if (h->length >= 24)
		take_ports(s, h->byte + 20, h->length >= 34);
}

/* What may stand between an IPv6 header and the transport header (RFC 8200, 4.1). */
static __always_inline bool is_extension(__u8 next)
{
	return next == 0 || next == 43 || next == 44 || next == 60;
}

#define EXTENSIONS 4 /* that are read over */

static __always_inline void read_ip6(struct subject *s, const struct headers *h, const unsigned char *head, __u32 at,
				     __u32 tail)
{
	__u8 extension[4];

	if (h->length < 40)
		return;
	__builtin_memcpy(&s->key.source, h->byte + 8, sizeof(s->key.source));
	__builtin_memcpy(&s->key.destination, h->byte + 24, sizeof(s->key.destination));
	__u8 next = h->byte[6];

	if (!is_extension(next)) {
		s->key.protocol = next;
		if (h->length >= 44)
			take_ports(s, h->byte + 40, h->length >= 54);
		return;
	}
	at += 40;
	for (int i = 0; i < EXTENSIONS && is_extension(next); i++) {
		if (at + sizeof(extension) > tail || bpf_probe_read_kernel(extension, sizeof(extension), head + at))
			return;
		if (next == 44) { /* a fragment; its offset is in units of eight bytes */
			at += 8;
			if ((extension[2] << 8 | extension[3]) & 0xfff8) {
				s->key.protocol = extension[0];
				s->key.flags |= FLAG_FRAGMENT;
				return;
			}
		} else {
			at += (extension[1] + 1) * 8;
		}
		next = extension[0];
	}
	s->key.protocol = next;
	read_transport(s, head, at, tail);
}

/* read_arp takes the IPv4 addresses of a message over Ethernet (RFC 826). */
static __always_inline void read_arp(struct subject *s, const struct headers *h)
{
	__be32 ip = 0;

	if (h->length < 28)
		return;
	__builtin_memcpy(&ip, h->byte + 14, sizeof(ip));
	s->key.source = address_from_ip4(ip);
	__builtin_memcpy(&ip, h->byte + 24, sizeof(ip));
	s->key.destination = address_from_ip4(ip);
}

/* find_network finds an IP header of a version where the kernel has not noted it: where
 * the data begins, or behind the Ethernet header. Not every packet that dies has got so
 * far that it was noted. */
static __always_inline __u32 find_network(struct headers *h, struct sk_buff *skb, const unsigned char *head,
					  __u32 noted, __u32 tail, __u8 version)
{
	__u32 data = skb->data - head;
	__u32 mac = skb->mac_header;

	read_headers(h, head, data, tail);
	if (h->byte[0] >> 4 == version)
		return data;
	if (mac != UNSET) {
		read_headers(h, head, mac + 14, tail);
		if (h->byte[0] >> 4 == version)
			return mac + 14;
	}
	h->length = 0;
	return noted;
}

/* read_packet reads addresses, ports and the like. */
static __always_inline void read_packet(struct subject *s, struct sk_buff *skb)
{
	const unsigned char *head = skb->head;
	__u32 tail = skb->tail;
	__u32 at = skb->network_header;
	struct headers h = {};
	__u8 version = 0;

	s->key.ethertype = skb->protocol;
	if (s->key.ethertype == ETHERTYPE_IP4)
		version = 4;
	else if (s->key.ethertype == ETHERTYPE_IP6)
		version = 6;
	if (!at || at == UNSET)
		at = skb->data - head;
	read_headers(&h, head, at, tail);
	if (version && h.byte[0] >> 4 != version)
		at = find_network(&h, skb, head, at, tail, version);
	s->skb = skb;
	s->network = at;
	s->length = skb->len + (__u32)(skb->data - head) - at;
	if (version == 4)
		read_ip4(s, &h, head, at, tail);
	else if (version == 6)
		read_ip6(s, &h, head, at, tail);
	else if (s->key.ethertype == ETHERTYPE_ARP)
		read_arp(s, &h);
}

/* place_packet says in which namespace a packet is: in that of its device. The socket
 * of a packet may be the sender's, in another one. */
static __always_inline bool place_packet(struct subject *s, struct sk_buff *skb, struct sock *sk)
{
	struct net_device *dev = skb->dev;

	if (dev && dev->nd_net.net) {
		bool looked = place_in(s, dev->nd_net.net);

		if (s->key.netns >= LEAST_INODE) {
			s->dev = dev;
			s->key.ifindex = dev->ifindex;
			return looked;
		}
	}
	if (sk && sk->__sk_common.skc_net.net) {
		bool looked = place_in(s, sk->__sk_common.skc_net.net);

		if (s->key.netns >= LEAST_INODE)
			return looked;
	}
	struct sock *own = skb->sk;

	if (own && own->__sk_common.skc_net.net) {
		bool looked = place_in(s, own->__sk_common.skc_net.net);

		if (s->key.netns >= LEAST_INODE)
			return looked;
	}
	/* the lowest bit says whether it holds a reference (SKB_DST_NOREF) */
	struct dst_entry *route = (struct dst_entry *)(skb->_skb_refdst & ~1UL);
	struct net *net = route ? BPF_CORE_READ(route, dev, nd_net.net) : 0;

	s->key.netns = net ? BPF_CORE_READ(net, ns.inum) : 0;
	s->key.cookie = net && bpf_core_field_exists(net->net_cookie) ? BPF_CORE_READ(net, net_cookie) : 0;
	return looked_at(s->key.netns);
}

/* read_socket reads the ends of a socket, its own as the source, and says whether its
 * namespace is looked at. */
static __always_inline bool read_socket(struct subject *s, const struct sock *sk)
{
	struct net *net = sk->__sk_common.skc_net.net;

	if (!net || !place_in(s, net))
		return false;
	s->socket = sk->__sk_common.skc_cookie.counter;
	__u16 family = sk->__sk_common.skc_family;

	if (family == AF_INET) {
		s->key.ethertype = ETHERTYPE_IP4;
		s->key.source = address_from_ip4(sk->__sk_common.skc_rcv_saddr);
		s->key.destination = address_from_ip4(sk->__sk_common.skc_daddr);
	} else if (family == AF_INET6 && bpf_core_field_exists(sk->__sk_common.skc_v6_daddr)) {
		s->key.ethertype = ETHERTYPE_IP6;
		for (int i = 0; i < 4; i++) {
			s->key.source.word[i] = sk->__sk_common.skc_v6_rcv_saddr.in6_u.u6_addr32[i];
			s->key.destination.word[i] = sk->__sk_common.skc_v6_daddr.in6_u.u6_addr32[i];
		}
	} else {
		return false;
	}
	s->source_port = __builtin_bswap16(sk->__sk_common.skc_num);
	if (!s->source_port) /* it has given its port back, but still knows which it was */
		s->source_port = BPF_CORE_READ((struct inet_sock *)sk, inet_sport);
	s->destination_port = sk->__sk_common.skc_dport;
	return true;
}

/* port_of_service is choose_port for a socket, by its state. */
static __always_inline void port_of_service(struct subject *s, __u8 state)
{
	if (state == STATE_SYN_SENT)
		s->key.flags |= TCP_SYN;
	if (state == STATE_SYN_RECV || state == STATE_NEW_SYN_RECV)
		s->key.flags |= TCP_SYN | TCP_ACK;
	choose_port(s);
	if (!s->destination_port) { /* it is the receiver; one of TCP was connected before */
		s->key.flags |= FLAG_SOURCE;
		s->key.port = s->key.protocol == IPPROTO_TCP ? 0 : s->source_port;
	}
}

/* side_of says which sides an end may be of: a port that is not known may be any, and so
 * may an address. */
static __always_inline __u8 side_of(const struct address *a, __be16 port)
{
	struct range all = { .length = 128, .address = *a };
	const struct side *s;
	__u8 of;

	if (!a->word[0] && !a->word[1] && !a->word[3])
		return SIDE_FROM | SIDE_TO;
	s = bpf_map_lookup_elem(&sides, &all);
	if (!s)
		return 0;
	of = s->of;
	if (port && s->from_port && port != s->from_port)
		of &= ~SIDE_FROM;
	if (port && s->to_port && port != s->to_port)
		of &= ~SIDE_TO;
	return of;
}

/* is_error tells an ICMP message about a packet (RFC 792, RFC 4443): its own ends are not
 * those of that packet. */
static __always_inline bool is_error(const struct event_key *key)
{
	__u8 type = key->port & 0xff;

	if (key->protocol == IPPROTO_ICMP)
		return type == 3 || type == 4 || type == 11 || type == 12;
	return key->protocol == IPPROTO_ICMPV6 && type && type < 128;
}

/* What a test may say: it is so, it is not so, or both where it is not known. */
enum { MAY_NOT = 1, MAY = 2 };

static __always_inline __u8 answer(bool is)
{
	return is ? MAY : MAY_NOT;
}

static __always_inline __u8 test_address(const volatile struct step *step, const struct address *a)
{
	if (!a->word[0] && !a->word[1] && (!a->word[2] || a->word[2] == MAPPED_PREFIX) && !a->word[3])
		return MAY | MAY_NOT;
	return answer((a->word[0] & step->mask.word[0]) == step->address.word[0] &&
		      (a->word[1] & step->mask.word[1]) == step->address.word[1] &&
		      (a->word[2] & step->mask.word[2]) == step->address.word[2] &&
		      (a->word[3] & step->mask.word[3]) == step->address.word[3]);
}

static __always_inline bool may_be_ip(const struct event_key *key)
{
	return !key->ethertype || key->ethertype == ETHERTYPE_IP4 || key->ethertype == ETHERTYPE_IP6;
}

static __always_inline __u8 test_port(const volatile struct step *step, const struct subject *s, __be16 port)
{
	if (port)
		return answer(host16(port) >= step->low && host16(port) <= step->high);
	if (!may_be_ip(&s->key) || (s->key.protocol && !has_ports(s->key.protocol)))
		return MAY_NOT;
	return MAY | MAY_NOT;
}

/* test_step answers one test. What is known of an event that is no packet are its ends. */
static __always_inline __u8 test_step(const volatile struct step *step, const struct subject *s)
{
	const struct event_key *key = &s->key;

	switch (step->test) {
	case TEST_ETHERTYPE:
		return key->ethertype ? answer(key->ethertype == step->low) : MAY | MAY_NOT;
	case TEST_PROTOCOL:
		if (!key->protocol && may_be_ip(key))
			return MAY | MAY_NOT;
		return answer(key->protocol && key->protocol == step->low);
	case TEST_FLAGS:
		if (!may_be_ip(key) || (key->protocol && key->protocol != IPPROTO_TCP))
			return MAY_NOT;
		if (!s->skb || key->flags & FLAG_FRAGMENT)
			return MAY | MAY_NOT;
		return answer(key->protocol && (key->flags & FLAGS_OF_TCP & step->low) == step->high);
	case TEST_SOURCE:
		return test_address(step, &key->source);
	case TEST_DESTINATION:
		return test_address(step, &key->destination);
	case TEST_SOURCE_PORT:
		return test_port(step, s, s->source_port);
	default:
		return test_port(step, s, s->destination_port);
	}
}

/* fits says whether it may be of a packet that the filter asks for; Filter.Match. Each
 * bit of yes and no is an answer that may be. */
static __noinline bool fits(const struct subject *s)
{
	__u64 yes = 0, no = 0;

	for (__u32 i = 0; i < STEPS && i < filter_steps; i++) {
		const volatile struct step *step = &filter[i];
		__u64 taken;
		__u8 may;

		switch (step->test) {
		case TEST_AND:
			yes = yes >> 1 & (yes | ~1ULL);
			no = no >> 1 | (no & 1);
			break;
		case TEST_OR:
			yes = yes >> 1 | (yes & 1);
			no = no >> 1 & (no | ~1ULL);
			break;
		case TEST_NOT:
			taken = yes & 1;
			yes = (yes & ~1ULL) | (no & 1);
			no = (no & ~1ULL) | taken;
			break;
		default:
			may = test_step(step, s);
			yes = yes << 1 | !!(may & MAY);
			no = no << 1 | !!(may & MAY_NOT);
		}
	}
	return yes & 1;
}

/* is_asked says whether somebody asks for it. User space looks closer, at what an ICMP
 * error is about: this is to keep what is asked for from being pushed out by all else. */
static __always_inline bool is_asked(const struct subject *s)
{
	__u8 source, destination;

	if (filter_steps && !is_error(&s->key) && !fits(s))
		return false;
	if (!ends)
		return true;
	destination = side_of(&s->key.destination, s->destination_port);
	if (is_error(&s->key))
		return destination;
	source = side_of(&s->key.source, s->source_port);
	if (ends == 1)
		return source | destination;
	return (source & SIDE_FROM && destination & SIDE_TO) || (source & SIDE_TO && destination & SIDE_FROM);
}

static __always_inline void count_share(const struct event_key *of, __u64 by)
{
	struct share_key key = { of->netns, of->reason };
	__u64 *count = bpf_map_lookup_elem(&shares, &key);

	if (count)
		*count += by;
	else
		bpf_map_update_elem(&shares, &key, &by, BPF_NOEXIST);
}

static __always_inline void count_total(const struct event_key *key)
{
	__u32 reason = 0;

	if (key->kind == KIND_DROP || key->kind == KIND_RESET)
		reason = key->reason < REASONS ? key->reason : REASONS - 1;
	__u32 at = key->kind * REASONS + reason;
	__u64 *count = bpf_map_lookup_elem(&totals, &at);

	if (!count)
		return;
	if (key->kind == KIND_RETRANSMIT || key->kind == KIND_FULL)
		__sync_fetch_and_add(count, 1); /* two programs count these, and one may interrupt the other */
	else
		*count += 1;
}

/* Examples of what was not asked for, likewise: those that were are to have the room. */
#define BESIDE_A_SECOND 256

/* affordable says whether one more example may be sent now. */
static __always_inline bool affordable(__u32 purse, __u64 now)
{
	struct budget *b = bpf_map_lookup_elem(&budgets, &purse);

	if (!b)
		return false;
	if (now - b->since > SECOND) {
		b->since = now;
		b->used = 0;
	}
	if (purse >= KINDS && b->used >= BESIDE_A_SECOND)
		return false;
	return b->used++ < examples_a_second;
}

static __always_inline void draft_packet(struct example *e, const struct subject *s)
{
	struct sk_buff *skb = s->skb;
	const unsigned char *head = skb->head;
	__u32 data = skb->data - head;
	__u32 mac = skb->mac_header;
	__u32 headers = 0;

	e->before = data - s->network;
	if (s->network < data)
		headers = data - s->network;
	if (headers > HEADER_LIMIT)
		headers = HEADER_LIMIT;
	e->headers = headers;
	if (headers)
		bpf_probe_read_kernel(e->header, headers, head + s->network);
	__builtin_memset(e->mac, 0, sizeof(e->mac));
	if (mac != UNSET && mac + 14 <= s->network)
		bpf_probe_read_kernel(e->mac, sizeof(e->mac), head + mac);
	e->packet_type = BPF_CORE_READ_BITFIELD(skb, pkt_type);
	e->summed = BPF_CORE_READ_BITFIELD(skb, ip_summed);
	const struct skb_shared_info *shared = (const void *)(head + skb->end);

	e->gso = BPF_CORE_READ(shared, gso_size);
	e->captured = skb->len > WHOLE_LIMIT ? PART_LIMIT : skb->len;
}

/* keep puts an example in the place of the oldest one of its kind, with the beginning of
 * its packet. */
static __always_inline void keep(struct example *e, const struct subject *s, __u32 program)
{
	__u64 *turn = bpf_map_lookup_elem(&turns, &program);

	if (!turn)
		return;
	if (s->skb) {
		const unsigned char *head = s->skb->head;
		__u32 tail = s->skb->tail;
		__u32 length = tail - s->network;

		if (s->network < tail) {
			if (length > HEADER_LIMIT)
				length = HEADER_LIMIT;
			if (!bpf_probe_read_kernel(e->header, length, head + s->network))
				e->headers = length;
		}
	}
	__u32 slot = program * KEPT + __sync_fetch_and_add(turn, 1) % KEPT;

	bpf_map_update_elem(&recent, &slot, e, BPF_ANY);
}

/* show sends an example to user space, or keeps it for who looks later. */
static __always_inline void show(void *ctx, const struct subject *s, __u32 program, bool stack)
{
	struct example *e = bpf_map_lookup_elem(&drafts, &program);

	if (!e)
		return;
	e->key = s->key;
	e->source_port = s->source_port;
	e->destination_port = s->destination_port;
	e->length = s->length;
	e->when = bpf_ktime_get_ns();
	e->socket = s->socket;
	e->retransmits = s->retransmits;
	e->asked = s->asked;
	e->captured = e->headers = e->before = e->gso = e->packet_type = e->summed = 0;
	e->device[0] = 0;
	if (s->dev)
		bpf_probe_read_kernel_str(e->device, sizeof(e->device), s->dev->name);
	e->pid = bpf_get_current_pid_tgid() >> 32;
	bpf_get_current_comm(e->command, sizeof(e->command));
	e->stack_bytes = 0;
	if (stack)
		e->stack_bytes = bpf_get_stack(ctx, e->stack, sizeof(e->stack), 0);
	if (keeps) {
		keep(e, s, program);
		return;
	}
	if (!s->skb) {
		bpf_perf_event_output(ctx, &examples, BPF_F_CURRENT_CPU, e, sizeof(*e));
		return;
	}
	draft_packet(e, s);
	if (bpf_skb_output(s->skb, &examples, (__u64)e->captured << 32 | BPF_F_CURRENT_CPU, e, sizeof(*e)) == 0)
		return;
	e->captured = 0;
	bpf_perf_event_output(ctx, &examples, BPF_F_CURRENT_CPU, e, sizeof(*e));
}

/* From then on every so many events the time and the greatest length are noted. */
#define OFTEN 64

/* What of a header is compared with that of the packet before: up to TCP's flags behind a
 * header of IPv6. */
#define WORDS 14

extern void *bpf_rdonly_cast(const void *, __u32)
__ksym __weak; /* since Linux 6.2 */

/* read_words reads the beginning of a packet, as a load each where the kernel lets it. */
static __always_inline bool read_words(__u32 *word, const unsigned char *from, __u32 words)
{
	if (!bpf_rdonly_cast)
		return !bpf_probe_read_kernel(word, words * 4, from);
#pragma unroll
	for (__u32 i = 0; i < words; i += 4) { /* any structure that has four words will do */
		const struct in6_addr *four = bpf_rdonly_cast(from + i * 4, bpf_core_type_id_kernel(struct in6_addr));

		for (__u32 j = 0; j < 4 && i + j < words; j++)
			word[i + j] = four->in6_u.u6_addr32[j];
	}
	return true;
}

/* same_ports says that a packet with such a transport header has this key. */
static __always_inline bool same_ports(const struct event_key *key, const __u32 *word)
{
	__be16 source = word[0], destination = word[0] >> 16;
	__u8 flags = 0;

	if (key->protocol == IPPROTO_TCP)
		flags = word[3] >> 8 & FLAGS_OF_TCP;
	else if (key->protocol != IPPROTO_UDP)
		return false;
	bool of_source = is_of_source(key->protocol, flags, source, destination);

	return key->port == (of_source ? source : destination) &&
	       key->flags == (of_source ? flags | FLAG_SOURCE : flags);
}

static __always_inline bool same_ip4(const struct event_key *key, const unsigned char *from, __u32 length)
{
	__u32 word[WORDS];

	if (key->protocol == IPPROTO_TCP) {
		if (length < 36 || !read_words(word, from, 9))
			return false;
	} else if (length < 24 || !read_words(word, from, 6)) {
		return false;
	}
	/* no options, no fragment but the first */
	return (__u8)word[0] == 0x45 && !(word[1] >> 16 & 0xff1f) && (__u8)(word[2] >> 8) == key->protocol &&
	       word[3] == key->source.word[3] && word[4] == key->destination.word[3] && same_ports(key, word + 5);
}

static __always_inline bool same_ip6(const struct event_key *key, const unsigned char *from, __u32 length)
{
	__u32 word[WORDS];

	if (key->protocol == IPPROTO_TCP) {
		if (length < 56 || !read_words(word, from, 14))
			return false;
	} else if (length < 44 || !read_words(word, from, 11)) {
		return false;
	}
	for (int i = 0; i < 4; i++) {
		if (word[2 + i] != key->source.word[i] || word[6 + i] != key->destination.word[i])
			return false;
	}
	return (word[0] & 0xf0) == 0x60 && (__u8)(word[1] >> 16) == key->protocol && same_ports(key, word + 10);
}

/* storms_on says that a packet that died is counted with the one before: it is what a storm
 * has most of, and costs no look into a table. Where it is asked for some packets only,
 * each is looked at. */
static __always_inline bool storms_on(struct storm *storm, struct sk_buff *skb, __u64 location, __u32 reason)
{
	const struct event_key *key = &storm->key;
	struct net_device *dev = skb->dev;
	__u32 at = skb->network_header, tail = skb->tail;

	if (key->location != location || key->reason != reason || !dev || key->ifindex != dev->ifindex ||
	    key->ethertype != skb->protocol || !at || at >= tail)
		return false;
	struct net *net = dev->nd_net.net;

	if (!net || key->netns != net->ns.inum)
		return false;
	if (bpf_core_field_exists(net->net_cookie) && key->cookie != (__u32)net->net_cookie)
		return false;
	if (key->ethertype == ETHERTYPE_IP4 ? !same_ip4(key, skb->head + at, tail - at)
					    : !same_ip6(key, skb->head + at, tail - at))
		return false;
	if (storm->count + 1 == OFTEN) /* this one and those before are put into the tables */
		return false;
	storm->count++;
	count_total(key);
	return true;
}

static __always_inline struct event *find_event(const struct subject *s)
{
	if (s->asked)
		return bpf_map_lookup_elem(&events, &s->key);
	return bpf_map_lookup_elem(&beside, &s->key);
}

static __always_inline void met_again(struct event *e, const struct subject *s, __u64 now)
{
	if (!e->count) { /* met on another processor */
		e->first = now;
		e->source_port = s->source_port;
		e->destination_port = s->destination_port;
		e->socket = s->socket;
		if (s->dev)
			bpf_probe_read_kernel_str(e->device, sizeof(e->device), s->dev->name);
	}
	e->count++;
	e->last = now;
	if (s->length > e->longest)
		e->longest = s->length;
}

/* settle puts what a storm has counted into the tables. What was pushed out of them
 * meanwhile is in the totals alone. */
static __always_inline void settle(struct storm *storm)
{
	struct event *e = bpf_map_lookup_elem(&events, &storm->key);

	storm->turns++;
	barrier();
	if (e)
		e->count += storm->count;
	if (keeps)
		count_share(&storm->key, storm->count);
	storm->count = 0;
	barrier();
	storm->turns++;
}

/* begin lets what comes be compared with another kind of event. */
static __always_inline void begin(struct storm *storm, const struct event_key *key)
{
	storm->turns++;
	barrier();
	storm->key = *key;
	barrier();
	storm->turns++;
}

/* is_storm says that events of a kind may be counted as a storm: what storms_on tells by
 * a header without options or extensions. */
static __always_inline bool is_storm(const struct event_key *key)
{
	return key->ifindex && !(key->flags & FLAG_FRAGMENT) &&
	       (key->protocol == IPPROTO_UDP || key->protocol == IPPROTO_TCP) &&
	       (key->ethertype == ETHERTYPE_IP4 || key->ethertype == ETHERTYPE_IP6);
}

/* note counts an event, and shows it if its like was not met before; then it returns
 * true. */
static __always_inline bool note(void *ctx, struct subject *s, __u32 program, bool stack)
{
	struct event *e;

	s->asked = is_asked(s);
	e = find_event(s);
	count_total(&s->key);
	if (keeps && s->key.kind == KIND_DROP)
		count_share(&s->key, 1);
	s->often = e && e->count > OFTEN;
	if (s->often && !s->many && e->count % OFTEN) { /* a storm: the clock costs as much as the rest */
		e->count++;
		return false;
	}
	__u64 now = bpf_ktime_get_ns();

	if (e) {
		met_again(e, s, now);
		if (keeps && affordable(program, now))
			show(ctx, s, program, stack);
		return false;
	}
	struct event fresh = {
		.count = 1,
		.first = now,
		.last = now,
		.socket = s->socket,
		.longest = s->length,
		.source_port = s->source_port,
		.destination_port = s->destination_port,
	};

	if (s->dev)
		bpf_probe_read_kernel_str(fresh.device, sizeof(fresh.device), s->dev->name);
	if (s->asked ? bpf_map_update_elem(&events, &s->key, &fresh, BPF_NOEXIST)
		     : bpf_map_update_elem(&beside, &s->key, &fresh, BPF_NOEXIST)) {
		e = find_event(s); /* another processor was faster */
		if (e) {
			e->count++;
			e->last = now;
		}
		return false;
	}
	if (!affordable(s->asked ? program : program + KINDS, now))
		return false;
	show(ctx, s, program, stack);
	return true;
}

/* read_sender takes the ends of a packet that died before it had an IP header from the
 * socket that sends it. */
static __always_inline void read_sender(struct subject *s, struct sk_buff *skb)
{
	struct sock *sk = skb->sk;
	__u32 netns = s->key.netns, cookie = s->key.cookie;
	bool read = sk && read_socket(s, sk);

	s->key.netns = netns;
	s->key.cookie = cookie;
	if (!read)
		return;
	s->key.protocol = sk->sk_protocol;
	port_of_service(s, sk->__sk_common.skc_state);
	s->skb = 0; /* its bytes are no packet yet */
}

#define TCP_CLOSE 7 /* the state of every socket that has none of its own (net/tcp_states.h) */

/* is_trial says that a program was run with the packet (BPF_PROG_TEST_RUN), which is freed as
 * if it were lost then. The kernel gives it a socket without a protocol, as nobody else has
 * of these families. */
static __always_inline bool is_trial(const struct sk_buff *skb)
{
	const struct sock *sk = skb->sk;

	return sk && sk->__sk_common.skc_state == TCP_CLOSE && !sk->sk_protocol &&
	       (sk->__sk_common.skc_family == AF_INET || sk->__sk_common.skc_family == AF_INET6 ||
		!sk->__sk_common.skc_family);
}

/* A packet died. */
SEC("tp_btf/kfree_skb")
int drop(__u64 *ctx)
{
	struct sk_buff *skb = (struct sk_buff *)ctx[0];
	const bool counts = !each && !packets && !ends && !filter_steps;
	struct storm *storm;
	__u32 zero = 0, reason = drop_reason == 2 ? ctx[2] : 0;

	storm = bpf_map_lookup_elem(&storms, &zero);
	if (!storm || is_trial(skb))
		return 0;
	if (counts && storms_on(storm, skb, ctx[1], reason))
		return 0;
	struct sock *receiver = 0;
	struct subject s = { .key.kind = KIND_DROP };

	if (drop_receiver == 3)
		receiver = (struct sock *)ctx[3];
	if (!place_packet(&s, skb, receiver))
		return 0;
	s.key.location = ctx[1];
	s.key.reason = reason;
	read_packet(&s, skb);
	if (!s.key.protocol && !s.key.ethertype)
		read_sender(&s, skb);
	if (receiver)
		s.socket = receiver->__sk_common.skc_cookie.counter;
	if (each) {
		s.asked = true;
		count_total(&s.key);
		show(ctx, &s, KIND_DROP, true);
		return 0;
	}
	s.many = storm->count;
	if (s.many)
		settle(storm);
	if (!note(ctx, &s, KIND_DROP, true) && packets && s.asked && affordable(KIND_DROP, bpf_ktime_get_ns()))
		show(ctx, &s, KIND_DROP, false);
	if (counts && s.often && is_storm(&s.key))
		begin(storm, &s.key);
	return 0;
}

/* How many times longer nobody had said anything than what is unread has waited. */
#define SILENCE 8

/* has_crossed says that a program closes a connection that was idle, at the moment at which
 * the other end has used it again: nothing was unread before. No program can help that. */
static __always_inline bool has_crossed(const struct sock *sk)
{
	struct tcp_sock *tcp = (struct tcp_sock *)sk;
	__u32 came = BPF_CORE_READ((struct inet_connection_sock *)sk, icsk_ack.lrcvtime);
	__u32 unread = BPF_CORE_READ(tcp, rcv_nxt) - BPF_CORE_READ(tcp, copied_seq);
	__u32 silence = came - BPF_CORE_READ(tcp, lsndtime);
	__u32 waited = (__u32)bpf_jiffies64() - came;

	return unread < BPF_CORE_READ(tcp, bytes_received) && (__s32)silence > 0 && waited < silence / SILENCE;
}

/* We refuse or abort a connection. */
SEC("tp_btf/tcp_send_reset")
int reset(__u64 *ctx)
{
	const struct sock *sk = (const struct sock *)ctx[0];
	struct sk_buff *skb = (struct sk_buff *)ctx[1];
	struct subject s = { .key.kind = KIND_RESET };

	if (reset_reason == 2)
		s.key.reason = ctx[2];
	if (skb) {
		if (!place_packet(&s, skb, (struct sock *)sk))
			return 0;
		read_packet(&s, skb);
		if (sk)
			s.socket = sk->__sk_common.skc_cookie.counter;
	} else if (sk) {
		if (!read_socket(&s, sk))
			return 0;
		s.key.protocol = IPPROTO_TCP;
		s.key.location = has_crossed(sk);
		port_of_service(&s, STATE_ESTABLISHED);
	}
	if (s.key.netns)
		note(ctx, &s, KIND_RESET, true);
	return 0;
}

/* We tell a sender by ICMP about its packet. */
SEC("tp_btf/icmp_send")
int icmp(__u64 *ctx)
{
	struct sk_buff *skb = (struct sk_buff *)ctx[0];
	struct subject s = { .key.kind = KIND_ICMP };

	if (!place_packet(&s, skb, 0))
		return 0;
	s.key.reason = (__u8)ctx[1] << 8 | (__u8)ctx[2];
	read_packet(&s, skb);
	note(ctx, &s, KIND_ICMP, true);
	return 0;
}

SEC("tp_btf/tcp_retransmit_skb")
int retransmit(__u64 *ctx)
{
	const struct sock *sk = (const struct sock *)ctx[0];
	struct sk_buff *skb = (struct sk_buff *)ctx[1];
	struct subject s = { .key.kind = KIND_RETRANSMIT };

	if (!sk || !read_socket(&s, sk))
		return 0;
	s.key.protocol = IPPROTO_TCP;
	s.key.reason = sk->__sk_common.skc_state;
	if (skb)
		s.length = skb->len;
	s.retransmits = BPF_CORE_READ((struct inet_connection_sock *)sk, icsk_retransmits);
	port_of_service(&s, s.key.reason);
	note(ctx, &s, KIND_RETRANSMIT, false);
	return 0;
}

/* We repeat the answer to a SYN: the third step of the handshake does not arrive. */
SEC("tp_btf/tcp_retransmit_synack")
int repeat_synack(__u64 *ctx)
{
	const struct request_sock *request = (const struct request_sock *)ctx[1];
	struct subject s = { .key.kind = KIND_RETRANSMIT };

	if (!request || !read_socket(&s, (const struct sock *)request))
		return 0;
	s.key.protocol = IPPROTO_TCP;
	s.key.reason = STATE_NEW_SYN_RECV;
	port_of_service(&s, STATE_NEW_SYN_RECV);
	note(ctx, &s, KIND_SYNACK, false);
	return 0;
}

/* A program will be told of an error by its socket. */
SEC("tp_btf/inet_sk_error_report")
int socket_error(__u64 *ctx)
{
	const struct sock *sk = (const struct sock *)ctx[0];
	struct subject s = { .key.kind = KIND_SOCKET_ERROR };

	if (!sk || !read_socket(&s, sk))
		return 0;
	s.key.protocol = sk->sk_protocol;
	s.key.reason = sk->sk_err;
	s.retransmits = BPF_CORE_READ((struct inet_connection_sock *)sk, icsk_retransmits);
	port_of_service(&s, sk->__sk_common.skc_state);
	note(ctx, &s, KIND_SOCKET_ERROR, false);
	return 0;
}

/* A neighbour did not answer. */
SEC("tp_btf/neigh_timer_handler")
int neighbour(__u64 *ctx)
{
	struct neighbour *n = (struct neighbour *)ctx[0];
	struct subject s = { .key.kind = KIND_NEIGHBOUR };
	__be32 ip = 0;

	if (n->nud_state != NEIGHBOUR_FAILED || !n->dev)
		return 0;
	struct net *net = n->dev->nd_net.net;

	if (!net || !place_in(&s, net))
		return 0;
	s.dev = n->dev;
	s.key.ifindex = n->dev->ifindex;
	if (n->tbl->family == AF_INET) {
		s.key.ethertype = ETHERTYPE_IP4;
		bpf_probe_read_kernel(&ip, sizeof(ip), n->primary_key);
		s.key.destination = address_from_ip4(ip);
	} else if (n->tbl->family == AF_INET6) {
		s.key.ethertype = ETHERTYPE_IP6;
		bpf_probe_read_kernel(&s.key.destination, sizeof(s.key.destination), n->primary_key);
	}
	note(ctx, &s, KIND_NEIGHBOUR, false);
	return 0;
}

/* A socket's queue has no room. */
SEC("tp_btf/sock_rcvqueue_full")
int queue_full(__u64 *ctx)
{
	const struct sock *sk = (const struct sock *)ctx[0];
	struct subject s = { .key.kind = KIND_FULL };

	if (!sk || !read_socket(&s, sk))
		return 0;
	s.key.protocol = sk->sk_protocol;
	port_of_service(&s, sk->__sk_common.skc_state);
	note(ctx, &s, KIND_FULL, false);
	return 0;
}

SEC("tp_btf/udp_fail_queue_rcv_skb")
int udp_full(__u64 *ctx)
{
	const struct sock *sk = (const struct sock *)ctx[1];
	struct subject s = { .key.kind = KIND_FULL };

	if (!sk || !read_socket(&s, sk))
		return 0;
	s.key.protocol = sk->sk_protocol;
	s.key.reason = -(int)ctx[0];
	port_of_service(&s, sk->__sk_common.skc_state);
	note(ctx, &s, KIND_UDP_FULL, false);
	return 0;
}

SEC("tp_btf/tcp_bad_csum")
int bad_checksum(__u64 *ctx)
{
	struct sk_buff *skb = (struct sk_buff *)ctx[0];
	struct subject s = { .key.kind = KIND_CHECKSUM };

	if (!place_packet(&s, skb, 0))
		return 0;
	read_packet(&s, skb);
	note(ctx, &s, KIND_CHECKSUM, false);
	return 0;
}

/* A TCP connection of ours came about or did not, or ended before it was closed. */
SEC("tp_btf/inet_sock_set_state")
int state(__u64 *ctx)
{
	const struct sock *sk = (const struct sock *)ctx[0];
	__u8 before = ctx[1], after = ctx[2];
	struct subject s = { .key.kind = KIND_STATE };

	if (before != STATE_SYN_SENT && !(before == STATE_SYN_RECV && after == STATE_CLOSE) &&
	    !(before == STATE_ESTABLISHED && after == STATE_CLOSE))
		return 0;
	if (!sk || !read_socket(&s, sk))
		return 0;
	s.key.protocol = sk->sk_protocol;
	s.key.reason = before << 8 | after;
	s.key.location = sk->sk_err;
	s.retransmits = BPF_CORE_READ((struct inet_connection_sock *)sk, icsk_retransmits);
	port_of_service(&s, before);
	note(ctx, &s, KIND_STATE, false);
	return 0;
}

static __always_inline enum ending ending_of(const struct sock *sk, __u8 before)
{
	int error = sk->sk_err;

	if (before == STATE_SYN_SENT && error == 111) /* ECONNREFUSED */
		return ENDING_REFUSED;
	if (before == STATE_SYN_SENT || error == 110) /* ETIMEDOUT */
		return ENDING_UNANSWERED;
	return error == 104 ? ENDING_RESET : ENDING_ANY; /* ECONNRESET */
}

static __always_inline void count_ending(enum ending how)
{
	__u64 *count = bpf_map_lookup_elem(&ended, &how);

	if (count)
		__sync_fetch_and_add(count, 1);
}

/* accept notes that connections come to a port. */
static __always_inline void accept(const struct sock *sk)
{
	struct subject s = {};
	__u8 known = 1;

	if (sk->sk_protocol != IPPROTO_TCP || !read_socket(&s, sk))
		return;
	struct server_key key = { .netns = s.key.netns, .port = s.source_port };

	if (!bpf_map_lookup_elem(&servers, &key))
		bpf_map_update_elem(&servers, &key, &known, BPF_ANY);
}

/* is_server says that an end is the one that did not open the connection. */
static __always_inline bool is_server(const struct subject *s, __u8 state)
{
	struct server_key key = { .netns = s->key.netns, .port = s->source_port };

	return state == STATE_SYN_RECV || (state != STATE_SYN_SENT && bpf_map_lookup_elem(&servers, &key));
}

/* A TCP connection has ended. Its numbers are read then, which costs nothing while it
 * lasts but that its port is noted if it was accepted. */
SEC("tp_btf/inet_sock_set_state")
int end(__u64 *ctx)
{
	const struct sock *sk = (const struct sock *)ctx[0];
	__u8 before = ctx[1], after = ctx[2];
	struct flow_key key = {};
	struct flow fresh = {}, *f;
	struct subject s = {};

	if (sk && before == STATE_SYN_RECV && after == STATE_ESTABLISHED)
		accept(sk);
	if (after != STATE_CLOSE || before == STATE_LISTEN || before == STATE_CLOSE || !sk)
		return 0;
	if (sk->sk_protocol != IPPROTO_TCP || !read_socket(&s, sk))
		return 0;
	struct tcp_sock *tcp = (struct tcp_sock *)sk;
	enum ending how = ending_of(sk, before);

	count_ending(ENDING_ANY);
	if (how)
		count_ending(how);
	key.of_client = !is_server(&s, before);
	key.client = key.of_client ? s.key.source : s.key.destination;
	key.server = key.of_client ? s.key.destination : s.key.source;
	key.port = key.of_client ? s.destination_port : s.source_port;
	key.netns = s.key.netns;
	f = bpf_map_lookup_elem(&flows, &key);
	if (!f) {
		bpf_map_update_elem(&flows, &key, &fresh, BPF_NOEXIST);
		f = bpf_map_lookup_elem(&flows, &key);
		if (!f)
			return 0;
	}
	__sync_fetch_and_add(&f->ended[ENDING_ANY], 1);
	if (how == ENDING_REFUSED)
		__sync_fetch_and_add(&f->ended[ENDING_REFUSED], 1);
	if (how == ENDING_UNANSWERED)
		__sync_fetch_and_add(&f->ended[ENDING_UNANSWERED], 1);
	if (how == ENDING_RESET)
		__sync_fetch_and_add(&f->ended[ENDING_RESET], 1);
	__sync_fetch_and_add(&f->sent, BPF_CORE_READ(tcp, bytes_acked));
	__sync_fetch_and_add(&f->received, BPF_CORE_READ(tcp, bytes_received));
	__sync_fetch_and_add(&f->retransmits, BPF_CORE_READ(tcp, total_retrans));
	__u32 rtt = BPF_CORE_READ(tcp, srtt_us) >> 3;

	if (rtt > f->longest_rtt)
		f->longest_rtt = rtt;
	f->last = bpf_ktime_get_ns();
	return 0;
}

/* mark_of tells packets apart that have had the same memory one after the other: by what
 * nobody changes on the way. Of the IP header that is its length and number, or part of its
 * label, which all packets of a flow may have in common; of TCP where its data and its
 * acknowledgement stand, of ICMP the number of a question. UDP has its data alone: its
 * checksum may be filled in by the device. */
static __always_inline __u32 mark_of(const struct subject *s)
{
	const unsigned char *head = s->skb->head;
	__u32 at = s->network + (s->key.ethertype == ETHERTYPE_IP6 ? 40 : 20);
	__u32 mark = 0, word[2] = {};

	bpf_probe_read_kernel(&mark, sizeof(mark), head + s->network + 2);
	at += s->key.protocol == IPPROTO_UDP ? 8 : 4;
	if (at + sizeof(word) <= s->skb->tail)
		bpf_probe_read_kernel(word, sizeof(word), head + at);
	return ((mark * 31) + word[0]) * 31 + word[1];
}

/* follows says that a packet can have come from one place to the other: into a queue or
 * out of it only where it is, by a device that it comes from anywhere. A queue that it was
 * in or has left by this device it meets again only when TCP sends it once more. */
static __always_inline bool follows(const struct spot *from, const struct spot *to)
{
	if (to->point == POINT_CAME)
		return from->point == POINT_LEFT;
	if (to->point == POINT_QUEUED && from->point != POINT_CAME && from->ifindex == to->ifindex)
		return false;
	return from->netns == to->netns;
}

static __always_inline void count_hop(const struct flight *was, const struct flight *is)
{
	struct hop_key key = { was->spot, is->spot };
	struct hop fresh = {}, *h = bpf_map_lookup_elem(&hops, &key);
	__u64 took = is->at - was->at;

	if (!h) {
		bpf_map_update_elem(&hops, &key, &fresh, BPF_NOEXIST);
		h = bpf_map_lookup_elem(&hops, &key);
		if (!h)
			return;
	}
	__sync_fetch_and_add(&h->count, 1);
	__sync_fetch_and_add(&h->total, took);
	if (took > h->longest)
		h->longest = took;
}

/* pass notes where and when a packet is that goes on, if it is asked for, and how long it
 * took from where it was seen before. */
static __always_inline int pass(struct sk_buff *skb, enum point point)
{
	struct subject s = {};
	__u64 id = (__u64)skb;
	struct flight now = {}, *was;

	if (!place_packet(&s, skb, 0) || !s.dev)
		return 0;
	read_packet(&s, skb);
	if (!s.key.protocol || !is_asked(&s))
		return 0;
	now.at = bpf_ktime_get_ns();
	now.spot.netns = s.key.netns;
	now.spot.ifindex = s.key.ifindex;
	now.spot.point = point;
	now.mark = mark_of(&s);
	was = bpf_map_lookup_elem(&flights, &id);
	if (was && was->mark == now.mark && follows(&was->spot, &now.spot))
		count_hop(was, &now);
	bpf_map_update_elem(&flights, &id, &now, BPF_ANY);
	return 0;
}

SEC("tp_btf/netif_receive_skb")
int came(__u64 *ctx)
{
	return pass((struct sk_buff *)ctx[0], POINT_CAME);
}

SEC("tp_btf/net_dev_queue")
int queued(__u64 *ctx)
{
	return pass((struct sk_buff *)ctx[0], POINT_QUEUED);
}

SEC("tp_btf/net_dev_start_xmit")
int left(__u64 *ctx)
{
	return pass((struct sk_buff *)ctx[0], POINT_LEFT);
}

/* What a system call was given. */
struct call {
	__u64 number;
	__u64 descriptor;
	__u64 second;
	__u64 fifth;
};

static __always_inline struct call read_call(void *regs)
{
	struct call c = { .number = ~0ULL };
	struct pt_regs___x86 *x86 = regs;
	struct pt_regs___arm64 *arm64 = regs;

	if (bpf_core_field_exists(x86->orig_ax)) {
		c.number = x86->orig_ax;
		c.descriptor = x86->di;
		c.second = x86->si;
		c.fifth = x86->r8;
	} else if (bpf_core_field_exists(arm64->syscallno)) {
		c.number = arm64->syscallno;
		c.descriptor = arm64->orig_x0;
		c.second = arm64->regs[1];
		c.fifth = arm64->regs[4];
	}
	return c;
}

static __always_inline bool is_call_of_interest(__u64 number)
{
	return number == call_connect || number == call_bind || number == call_sendto || number == call_sendmsg ||
	       number == call_sendmmsg || number == call_write || number == call_writev;
}

/* is_usual tells what programs meet all the time: not now, already, interrupted, no
 * such descriptor, an address of a wrong kind. EINVAL is not among them: a route of type
 * blackhole says so. */
static __always_inline bool is_usual(long error)
{
	switch (error) {
	case 4:   /* EINTR */
	case 9:   /* EBADF */
	case 11:  /* EAGAIN */
	case 14:  /* EFAULT */
	case 32:  /* EPIPE: the other end has closed, or this one */
	case 88:  /* ENOTSOCK */
	case 89:  /* EDESTADDRREQ */
	case 97:  /* EAFNOSUPPORT */
	case 106: /* EISCONN */
	case 107: /* ENOTCONN */
	case 114: /* EALREADY */
	case 115: /* EINPROGRESS */
		return true;
	}
	return error >= 512; /* ERESTARTSYS and the like, of the kernel alone */
}

/* socket_of finds the socket of a descriptor of the calling task. */
static __always_inline struct sock *socket_of(__u32 descriptor)
{
	struct task_struct *task = (struct task_struct *)bpf_get_current_task();
	struct fdtable *table = BPF_CORE_READ(task, files, fdt);
	struct file **files = BPF_CORE_READ(table, fd);
	struct file *file = 0;
	struct socket *socket;

	if (descriptor >= BPF_CORE_READ(table, max_fds))
		return 0;
	bpf_probe_read_kernel(&file, sizeof(file), files + descriptor);
	if (!file || (BPF_CORE_READ(file, f_inode, i_mode) & TYPE_OF_FILE) != SOCKET_FILE)
		return 0;
	socket = BPF_CORE_READ(file, private_data);
	return BPF_CORE_READ(socket, sk);
}

/* read_call_socket is read_socket for a socket whose pointer the verifier does not know. */
static __always_inline bool read_call_socket(struct subject *s, struct sock *sk)
{
	struct in6_addr ip6 = {};

	struct net *net = BPF_CORE_READ(sk, __sk_common.skc_net.net);

	s->key.netns = BPF_CORE_READ(net, ns.inum);
	if (!looked_at(s->key.netns))
		return false;
	if (bpf_core_field_exists(net->net_cookie))
		s->key.cookie = BPF_CORE_READ(net, net_cookie);
	__u16 family = BPF_CORE_READ(sk, __sk_common.skc_family);

	s->socket = BPF_CORE_READ(sk, __sk_common.skc_cookie.counter);
	s->key.protocol = BPF_CORE_READ(sk, sk_protocol);
	if (family == AF_INET) {
		s->key.ethertype = ETHERTYPE_IP4;
		s->key.source = address_from_ip4(BPF_CORE_READ(sk, __sk_common.skc_rcv_saddr));
		s->key.destination = address_from_ip4(BPF_CORE_READ(sk, __sk_common.skc_daddr));
	} else if (family == AF_INET6 && bpf_core_field_exists(sk->__sk_common.skc_v6_daddr)) {
		s->key.ethertype = ETHERTYPE_IP6;
		BPF_CORE_READ_INTO(&ip6, sk, __sk_common.skc_v6_rcv_saddr);
		__builtin_memcpy(&s->key.source, &ip6, sizeof(s->key.source));
		BPF_CORE_READ_INTO(&ip6, sk, __sk_common.skc_v6_daddr);
		__builtin_memcpy(&s->key.destination, &ip6, sizeof(s->key.destination));
	} else {
		return false;
	}
	s->source_port = __builtin_bswap16(BPF_CORE_READ(sk, __sk_common.skc_num));
	if (!s->source_port)
		s->source_port = BPF_CORE_READ((struct inet_sock *)sk, inet_sport);
	s->destination_port = BPF_CORE_READ(sk, __sk_common.skc_dport);
	return true;
}

/* read_target takes what the program named as the other end, which a socket that was
 * refused does not hold. */
static __always_inline void read_target(struct subject *s, const void *given)
{
	struct {
		__u16 family;
		__be16 port;
		__be32 ip4; /* or the flow of IPv6 */
		struct address ip6;
	} address = {};

	if (!given || bpf_probe_read_user(&address, 8, given))
		return;
	if (address.family == AF_INET) {
		s->key.destination = address_from_ip4(address.ip4);
	} else if (address.family == AF_INET6) {
		if (bpf_probe_read_user(&address, sizeof(address), given))
			return;
		s->key.destination = address.ip6;
	} else {
		return;
	}
	s->destination_port = address.port;
}

/* A system call about a socket was refused. */
SEC("tp_btf/sys_exit")
int call(__u64 *ctx)
{
	long error = -(long)ctx[1];
	struct subject s = { .key.kind = KIND_CALL };
	const void *given = 0;

	if (error <= 0 || error > 4095 || is_usual(error))
		return 0;
	struct call c = read_call((void *)ctx[0]);

	if (!is_call_of_interest(c.number))
		return 0;
	struct sock *sk = socket_of(c.descriptor);

	if (!sk || !read_call_socket(&s, sk))
		return 0;
	if (c.number == call_connect || c.number == call_bind)
		given = (const void *)c.second;
	else if (c.number == call_sendto)
		given = (const void *)c.fifth;
	else if (c.number == call_sendmsg || c.number == call_sendmmsg)
		bpf_probe_read_user(&given, sizeof(given), (const void *)c.second);
	read_target(&s, given);
	if (given)
		s.key.port = s.destination_port;
	else
		choose_port(&s);
	s.key.reason = error;
	s.key.location = c.number;
	note(ctx, &s, KIND_CALL, false);
	return 0;
}

/* The kernel gives some of its helpers to GPL-compatible programs only. */
char __license[] SEC("license") = "Dual MIT/GPL";
