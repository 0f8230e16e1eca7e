//go:build ignore

// SPDX-License-Identifier: MIT OR GPL-2.0-only
/* What the node's own processes ask the cluster's DNS Service over UDP goes to a socket of
 * the agent's on the node while the agent is there, else where it would go without us.
 *
 * connect() and sendmsg() get the agent's address instead of the Service's, before the
 * first packet exists; recvmsg() and getpeername() show the Service again. Other network
 * namespaces, TCP and other ports are left alone, and so are the agent's own sockets.
 * One text serves both families; an IPv6 socket that talks to ::ffff:a.b.c.d is one of IPv4.
 */
#include "../../bpf/address.h"
#include <bpf/bpf_core_read.h>

#define IPPROTO_UDP 17
#define DNS_PORT    __builtin_bswap16(53)

enum { ALLOWED = 1 };

/* The network namespace of the node. */
const volatile __u64 node_cookie = 0;

/* Whether the kernel lets programs read its memory: not where it is locked down for
 * confidentiality (kernel_lockdown(7)). */
const volatile bool reads_kernel = true;

/* How long after its last beat the agent is taken to be there, in nanoseconds. */
const volatile __u64 silence = 500000000;

/* How long after that an answer may still wait in a socket of the client's, which asks
 * again after 5 s (resolv.conf(5), timeout). Later somebody else may have the agent's port. */
#define PATIENCE 5000000000ULL

enum family { FAMILY_IP4, FAMILY_IP6, FAMILY_COUNT };

/* Where a query is sent instead: all zero where a family has no DNS Service, and without a
 * port where the agent has no socket. */
struct detour {
	struct address service;
	struct address agent;
	__be16 port;
	__u8 zero[6];
};

struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__type(key, enum family);
	__type(value, struct detour);
	__uint(max_entries, FAMILY_COUNT);
} detours SEC(".maps");

/* What the agent says of itself. */
struct presence {
	__u64 beat;  /* when it was heard of last, in nanoseconds since boot */
	__u64 aside; /* it is there, and wants no more: 1 for now, 2 for it ends */
};

struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__type(key, __u32);
	__type(value, struct presence);
	__uint(max_entries, 1);
} presences SEC(".maps");

/* The agent's sockets, by family. The kernel takes them out when they are closed, however
 * the process ends. */
struct {
	__uint(type, BPF_MAP_TYPE_SOCKMAP);
	__type(key, __u32);
	__type(value, __u64);
	__uint(max_entries, FAMILY_COUNT);
} listeners SEC(".maps");

/* Sockets by which the agent asks others: these are never sent to itself. */
struct {
	__uint(type, BPF_MAP_TYPE_SK_STORAGE);
	__type(key, int);
	__type(value, __u8);
	__uint(map_flags, BPF_F_NO_PREALLOC);
} askers SEC(".maps");

/* Queries that wait for the agent, as they came. It deletes what it has answered; what an
 * agent leaves behind when it is killed its successor answers, by the same port. Longer ones
 * are lost with it: with a name of 255 bytes, an OPT record and a cookie of the longest kind
 * (RFC 7873, 4) a query has 354. */
#define QUERY_LIMIT 480

struct asker {
	struct address address;
	__be16 port;
	__be16 id; /* of the message */
	__be16 to; /* the agent's port */
	__u16 zero;
};

struct query {
	__u64 since; /* in nanoseconds since boot */
	__u32 length;
	__u32 zero;
	__u8 message[QUERY_LIMIT];
};

struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__type(key, struct asker);
	__type(value, struct query);
	__uint(max_entries, 2048); /* 540 bytes each, while they wait */
	__uint(map_flags, BPF_F_NO_PREALLOC);
} waiting SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_PERCPU_ARRAY);
	__type(key, __u32);
	__type(value, struct query);
	__uint(max_entries, 1);
} drafts SEC(".maps");

/* What became of calls of the node's processes that are for the DNS Service. */
enum outcome {
	OUTCOME_STEERED,    /* connected or sent to the agent */
	OUTCOME_UNATTENDED, /* left to the DNS Service: the agent does not serve, or was not heard of for 0.5 s */
	OUTCOME_ASIDE,      /* left to the DNS Service: too many queries wait for the agent, or it is about to end */
	OUTCOME_BOUND,      /* left to the DNS Service: the socket sends by one device, which leads to no other */
	OUTCOME_COUNT,
};

struct {
	__uint(type, BPF_MAP_TYPE_PERCPU_ARRAY);
	__type(key, enum outcome);
	__type(value, __u64);
	__uint(max_entries, OUTCOME_COUNT);
} outcomes SEC(".maps");

static __always_inline void count(enum outcome outcome)
{
	__u64 *n = bpf_map_lookup_elem(&outcomes, &outcome);

	if (n)
		(*n)++;
}

static __always_inline enum family family_of(const struct address *address)
{
	return !address->word[0] && !address->word[1] && address->word[2] == MAPPED_PREFIX ? FAMILY_IP4 : FAMILY_IP6;
}

static __always_inline const struct detour *detour_of(const struct address *address)
{
	enum family family = family_of(address);

	return bpf_map_lookup_elem(&detours, &family);
}

static __always_inline bool is_heard(const struct presence *agent, __u64 within)
{
	return agent && agent->beat && bpf_ktime_get_boot_ns() < agent->beat + within;
}

static __always_inline const struct presence *find_agent(void)
{
	__u32 zero = 0;

	return bpf_map_lookup_elem(&presences, &zero);
}

/* listens says whether the agent's socket for a family is open. */
static __always_inline bool listens(enum family family)
{
	struct bpf_sock *sk = bpf_map_lookup_elem(&listeners, &family);

	if (!sk)
		return false;
	bpf_sk_release(sk);
	return true;
}

/* Of the kernel's own types what says by which device a socket sends. Names of fields are
 * matched, offsets are those of the running kernel (CO-RE). */
struct in6_pktinfo {
	int ipi6_ifindex; /* IPV6_PKTINFO */
} __attribute__((preserve_access_index));

struct ipv6_pinfo {
	struct in6_pktinfo sticky_pktinfo;
	int ucast_oif; /* IPV6_UNICAST_IF */
} __attribute__((preserve_access_index));

struct inet_sock {
	struct ipv6_pinfo *pinet6;
	int uc_index; /* IP_UNICAST_IF */
} __attribute__((preserve_access_index));

/* What the context is: the verifier lets nobody find a field behind bpf_sock_addr's sk. */
struct bpf_sock_addr_kern {
	struct inet_sock *sk;
} __attribute__((preserve_access_index));

/* is_bound says whether a socket sends by one device. Of a single message (IP_PKTINFO of
 * sendmsg()) no program sees it. */
static __always_inline bool is_bound(struct bpf_sock_addr *ctx, enum family family)
{
	struct inet_sock *sk;

	if (ctx->sk->bound_dev_if)
		return true;
	if (!reads_kernel)
		return false;
	sk = BPF_CORE_READ((struct bpf_sock_addr_kern *)ctx, sk);
	if (family == FAMILY_IP4)
		return BPF_CORE_READ(sk, uc_index);
	if (!bpf_core_field_exists(sk->pinet6)) /* a kernel without IPv6 */
		return false;
	return BPF_CORE_READ(sk, pinet6, ucast_oif) || BPF_CORE_READ(sk, pinet6, sticky_pktinfo.ipi6_ifindex);
}

/* decide says what becomes of a call that is for the DNS Service. */
static __always_inline enum outcome decide(struct bpf_sock_addr *ctx, const struct detour *by)
{
	const struct presence *agent = find_agent();

	if (!by->port || !is_heard(agent, silence) || !listens(family_of(&by->service)))
		return OUTCOME_UNATTENDED;
	if (agent->aside)
		return OUTCOME_ASIDE;
	if (is_bound(ctx, family_of(&by->service)))
		return OUTCOME_BOUND;
	return OUTCOME_STEERED;
}

/* steer finds where a call goes instead; NULL if it is not for us, or is to go where it
 * was to go. */
static __always_inline const struct detour *steer(struct bpf_sock_addr *ctx, const struct address *to)
{
	const struct detour *by;

	if (ctx->protocol != IPPROTO_UDP || (__be16)ctx->user_port != DNS_PORT)
		return 0;
	by = detour_of(to);
	if (!by || !address_equal(&by->service, to) || bpf_get_netns_cookie(ctx) != node_cookie)
		return 0;
	if (!ctx->sk || bpf_sk_storage_get(&askers, ctx->sk, 0, 0))
		return 0;
	enum outcome outcome = decide(ctx, by);

	count(outcome);
	return outcome == OUTCOME_STEERED ? by : 0;
}

/* shown finds what stands for the agent's address; NULL if it is not the agent's. */
static __always_inline const struct detour *shown(struct bpf_sock_addr *ctx, const struct address *from)
{
	const struct detour *by;

	if (ctx->protocol != IPPROTO_UDP)
		return 0;
	by = detour_of(from);
	if (!by || !by->port || by->port != (__be16)ctx->user_port || !address_equal(&by->agent, from) ||
	    bpf_get_netns_cookie(ctx) != node_cookie)
		return 0;
	return by;
}

static __always_inline struct address address_from_ip6(struct bpf_sock_addr *ctx)
{
	struct address a = {
		.word = { ctx->user_ip6[0], ctx->user_ip6[1], ctx->user_ip6[2], ctx->user_ip6[3] },
	};

	return a;
}

static __always_inline void write_ip4(struct bpf_sock_addr *ctx, const struct address *a, __be16 port)
{
	ctx->user_ip4 = a->word[3];
	ctx->user_port = port;
}

static __always_inline void write_ip6(struct bpf_sock_addr *ctx, const struct address *a, __be16 port)
{
	ctx->user_ip6[0] = a->word[0];
	ctx->user_ip6[1] = a->word[1];
	ctx->user_ip6[2] = a->word[2];
	ctx->user_ip6[3] = a->word[3];
	ctx->user_port = port;
}

static __always_inline int ask4(struct bpf_sock_addr *ctx)
{
	struct address to = address_from_ip4(ctx->user_ip4);
	const struct detour *by = steer(ctx, &to);

	if (by)
		write_ip4(ctx, &by->agent, by->port);
	return ALLOWED;
}

static __always_inline int ask6(struct bpf_sock_addr *ctx)
{
	struct address to = address_from_ip6(ctx);
	const struct detour *by = steer(ctx, &to);

	if (by)
		write_ip6(ctx, &by->agent, by->port);
	return ALLOWED;
}

SEC("cgroup/connect4")
int dns_connect4(struct bpf_sock_addr *ctx)
{
	return ask4(ctx);
}

SEC("cgroup/connect6")
int dns_connect6(struct bpf_sock_addr *ctx)
{
	return ask6(ctx);
}

SEC("cgroup/sendmsg4")
int dns_sendmsg4(struct bpf_sock_addr *ctx)
{
	return ask4(ctx);
}

SEC("cgroup/sendmsg6")
int dns_sendmsg6(struct bpf_sock_addr *ctx)
{
	return ask6(ctx);
}

SEC("cgroup/recvmsg4")
int dns_recvmsg4(struct bpf_sock_addr *ctx)
{
	struct address from = address_from_ip4(ctx->user_ip4);
	const struct detour *by = shown(ctx, &from);

	if (by && is_heard(find_agent(), silence + PATIENCE))
		write_ip4(ctx, &by->service, DNS_PORT);
	return ALLOWED;
}

SEC("cgroup/recvmsg6")
int dns_recvmsg6(struct bpf_sock_addr *ctx)
{
	struct address from = address_from_ip6(ctx);
	const struct detour *by = shown(ctx, &from);

	if (by && is_heard(find_agent(), silence + PATIENCE))
		write_ip6(ctx, &by->service, DNS_PORT);
	return ALLOWED;
}

SEC("cgroup/getpeername4")
int dns_peername4(struct bpf_sock_addr *ctx)
{
	struct address peer = address_from_ip4(ctx->user_ip4);
	const struct detour *by = shown(ctx, &peer);

	if (by)
		write_ip4(ctx, &by->service, DNS_PORT);
	return ALLOWED;
}

SEC("cgroup/getpeername6")
int dns_peername6(struct bpf_sock_addr *ctx)
{
	struct address peer = address_from_ip6(ctx);
	const struct detour *by = shown(ctx, &peer);

	if (by)
		write_ip6(ctx, &by->service, DNS_PORT);
	return ALLOWED;
}

#define UDP_HEADER 8
#define DNS_HEADER 12
#define ETH_P_IPV6 0x86dd

/* read_asker finds who has sent a datagram, and with which id. */
static __always_inline bool read_asker(struct __sk_buff *skb, struct asker *from)
{
	bool ip6 = skb->protocol == __builtin_bswap16(ETH_P_IPV6);

	if (!ip6)
		from->address.word[2] = MAPPED_PREFIX;
	if (ip6 && bpf_skb_load_bytes_relative(skb, 8, from->address.word, 16, BPF_HDR_START_NET))
		return false;
	if (!ip6 && bpf_skb_load_bytes_relative(skb, 12, &from->address.word[3], 4, BPF_HDR_START_NET))
		return false;
	return !bpf_skb_load_bytes(skb, 0, &from->port, 2) && !bpf_skb_load_bytes(skb, 2, &from->to, 2) &&
	       !bpf_skb_load_bytes(skb, UDP_HEADER, &from->id, 2);
}

/* dns_keep sees each datagram that comes to a socket of the agent's, from its UDP header on,
 * before it is in the queue. All of them go on. */
SEC("socket")
int dns_keep(struct __sk_buff *skb)
{
	struct asker from = {};
	__u32 zero = 0, length = skb->len - UDP_HEADER;
	struct query *draft = bpf_map_lookup_elem(&drafts, &zero);

	if (!draft || length < DNS_HEADER || !read_asker(skb, &from))
		return skb->len;
	/* one comparison of a difference would tell the verifier of Linux 6.1 nothing */
	asm volatile("" : "+r"(length));
	if (length > QUERY_LIMIT)
		return skb->len;
	if (bpf_skb_load_bytes(skb, UDP_HEADER, draft->message, length))
		return skb->len;
	draft->length = length;
	draft->since = bpf_ktime_get_boot_ns();
	bpf_map_update_elem(&waiting, &from, draft, BPF_ANY);
	return skb->len;
}

/* The kernel gives some of its helpers to GPL-compatible programs only. */
char __license[] SEC("license") = "Dual MIT/GPL";
