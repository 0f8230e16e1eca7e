//go:build ignore

// SPDX-License-Identifier: MIT OR GPL-2.0-only
/* The connect path: a Service address given to connect() or sendmsg() becomes
 * a backend's before the first packet exists, so that packets of the connection
 * cost nothing. recvmsg() and getpeername() show the Service again.
 *
 * IPv4 and IPv6 differ only in where the context keeps the address. An IPv6
 * socket that talks to ::ffff:a.b.c.d meets the same keys.
 */
#include "../../bpf/packet.h"
#include "service.h"

#define IPPROTO_MPTCP 262
#define ECONNREFUSED  111
#define EHOSTUNREACH  113

enum { REFUSED = 0, ALLOWED = 1 };

/* bpf_set_retval came with Linux 5.18. Without it a refused call ends with
 * EPERM instead of ECONNREFUSED. */
const volatile bool can_set_error = true;

/* Which path serves where neither the Service nor the namespace asks for one. */
const volatile __u8 default_path = PATH_SOCKET;

/* The namespace of the node itself. Its processes have no pod's veth, so their
 * sockets are always served here. */
const volatile __u64 node_cookie = 0;

/* Network namespaces that ask for a path: their cookie -> enum service_path. */
struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__type(key, __u64);
	__type(value, __u8);
	__uint(max_entries, 4096); /* pods of one node; Kubernetes plans for 110 */
	__uint(map_flags, BPF_F_NO_PREALLOC);
} paths SEC(".maps");

/* left_to_packets says that this socket is not served for a Service, because its
 * packets are: a sidecar that asks for the original destination must find the
 * Service, and a virtual machine's sockets are not ours to see. If the Service
 * and the namespace disagree, packets win: somebody needs them. */
static __always_inline bool left_to_packets(const struct question *asked, __u8 by_service)
{
	__u64 cookie = asked->cookie;

	if (asked->origin == ORIGIN_NODE)
		return false;
	if (by_service == PATH_PACKET)
		return true;
	__u8 *path = bpf_map_lookup_elem(&paths, &cookie);

	if (path)
		return *path == PATH_PACKET;
	return by_service == PATH_DEFAULT && default_path == PATH_PACKET;
}

/* Where a socket was steered: the answer to getpeername() and recvmsg(). */
struct flow {
	struct address service;
	struct address backend;
	__be16 service_port;
	__be16 backend_port;
	__u32 number; /* of the backend */
};

/* The flow of a connected socket. It lives and dies with the socket, so there
 * is no table that could fill or forget. */
struct {
	__uint(type, BPF_MAP_TYPE_SK_STORAGE);
	__type(key, int);
	__type(value, struct flow);
	__uint(map_flags, BPF_F_NO_PREALLOC);
} connected SEC(".maps");

/* How many Services one unconnected UDP socket can talk to at the same time
 * before the oldest flow gives way (counted: flow_forgotten). */
#define SENT_FLOWS 8

struct sent_flows {
	struct bpf_spin_lock lock; /* threads share sockets */
	__u32 next;                /* the place that gives way next */
	__u32 last;                /* the place used last */
	__u32 zero;
	struct flow flow[SENT_FLOWS];
};

/* The flows of a UDP socket that sends without connecting. */
struct {
	__uint(type, BPF_MAP_TYPE_SK_STORAGE);
	__type(key, int);
	__type(value, struct sent_flows);
	__uint(map_flags, BPF_F_NO_PREALLOC);
} sent SEC(".maps");

/* turn_away ends a call. What would be dropped as a packet ends at once as well:
 * nobody has to wait for a timeout. */
static __always_inline int turn_away(const struct decision *to)
{
	count(to->reason);
	if (!can_set_error)
		return REFUSED;
	if (to->verdict == VERDICT_REFUSE)
		bpf_set_retval(-ECONNREFUSED);
	else if (to->reason == REASON_NO_LOCAL_BACKEND)
		bpf_set_retval(-EHOSTUNREACH);
	return REFUSED; /* else EPERM, as from a rule of netfilter */
}

static __always_inline struct question question_of(struct bpf_sock_addr *ctx, struct address address)
{
	__u64 cookie = bpf_get_netns_cookie(ctx);
	struct question asked = {
		.key = {
			.address = address,
			.port = ctx->user_port,
			.protocol = ctx->protocol == IPPROTO_MPTCP ? IPPROTO_TCP : ctx->protocol,
		},
		.origin = cookie == node_cookie ? ORIGIN_NODE : ORIGIN_POD,
		.cookie = cookie,
	};

	return asked;
}

static __always_inline void make_flow(struct flow *flow, const struct service_key *key, const struct decision *to)
{
	flow->service = key->address;
	flow->service_port = key->port;
	flow->backend = to->backend.address;
	flow->backend_port = to->backend.port;
	flow->number = to->number;
}

/* steer decides for connect() and remembers the flow on the socket. Where the
 * result is ALLOWED and *to is a forward, the caller writes the address. */
static __always_inline int steer(struct bpf_sock_addr *ctx, const struct question *asked, struct decision *to)
{
	decide(asked, to);
	if (to->verdict != VERDICT_NOT_A_SERVICE && (handed_over() || left_to_packets(asked, to->path)))
		to->verdict = VERDICT_NOT_A_SERVICE;
	if (to->verdict == VERDICT_NOT_A_SERVICE) {
		/* a UDP socket may have been connected to a Service before */
		bpf_sk_storage_delete(&connected, ctx->sk);
		return ALLOWED;
	}
	if (to->verdict != VERDICT_FORWARD)
		return turn_away(to);
	struct flow *flow = bpf_sk_storage_get(&connected, ctx->sk, 0, BPF_SK_STORAGE_GET_F_CREATE);

	if (flow)
		make_flow(flow, &asked->key, to);
	else
		count(REASON_NO_STORAGE); /* the connection works, getpeername() shows the backend */
	count(REASON_FORWARDED);
	return ALLOWED;
}

SEC("cgroup/connect4")
int connect4(struct bpf_sock_addr *ctx)
{
	struct question asked = question_of(ctx, address_from_ip4(ctx->user_ip4));
	struct decision to = {};
	int result = steer(ctx, &asked, &to);

	if (to.verdict == VERDICT_FORWARD) {
		ctx->user_ip4 = to.backend.address.word[3];
		ctx->user_port = to.backend.port;
	}
	return result;
}

static __always_inline struct address address_from_ip6(struct bpf_sock_addr *ctx)
{
	struct address a = {
		.word = { ctx->user_ip6[0], ctx->user_ip6[1], ctx->user_ip6[2], ctx->user_ip6[3] },
	};

	return a;
}

static __always_inline void write_ip6(struct bpf_sock_addr *ctx, const struct address *a, __be16 port)
{
	ctx->user_ip6[0] = a->word[0];
	ctx->user_ip6[1] = a->word[1];
	ctx->user_ip6[2] = a->word[2];
	ctx->user_ip6[3] = a->word[3];
	ctx->user_port = port;
}

SEC("cgroup/connect6")
int connect6(struct bpf_sock_addr *ctx)
{
	struct question asked = question_of(ctx, address_from_ip6(ctx));
	struct decision to = {};
	int result = steer(ctx, &asked, &to);

	if (to.verdict == VERDICT_FORWARD)
		write_ip6(ctx, &to.backend.address, to.backend.port);
	return result;
}

/* find_sent copies the socket's flow to a Service, if there is one. */
static __always_inline bool find_sent(struct sent_flows *flows, const struct service_key *key, struct flow *found)
{
	bool hit = false;

	bpf_spin_lock(&flows->lock);
#pragma unroll
	for (int i = 0; i < SENT_FLOWS; i++) {
		if (!hit && flows->flow[i].service_port == key->port &&
		    address_equal(&flows->flow[i].service, &key->address)) {
			*found = flows->flow[i];
			flows->last = i;
			hit = true;
		}
	}
	bpf_spin_unlock(&flows->lock);
	return hit;
}

/* keep_sent writes the socket's flow to a Service over its last one to the same
 * Service, else into a free place, else over the oldest. */
static __always_inline bool keep_sent(struct sent_flows *flows, const struct flow *flow)
{
	__u32 place = SENT_FLOWS;
	bool forgotten = false;

	bpf_spin_lock(&flows->lock);
#pragma unroll
	for (int i = 0; i < SENT_FLOWS; i++) {
		if (place == SENT_FLOWS && flows->flow[i].service_port == flow->service_port &&
		    address_equal(&flows->flow[i].service, &flow->service))
			place = i;
	}
	if (place == SENT_FLOWS) {
		place = flows->next % SENT_FLOWS;
		flows->next++;
		forgotten = flows->next > SENT_FLOWS;
	}
#pragma unroll
	for (int i = 0; i < SENT_FLOWS; i++) {
		if (i == place)
			flows->flow[i] = *flow;
	}
	flows->last = place;
	bpf_spin_unlock(&flows->lock);
	return forgotten;
}

/* still_serves says whether a flow's backend is there and the same. */
static __always_inline bool still_serves(const struct flow *flow, __u32 service)
{
	struct backend backend = {};

	return read_backend(flow->number, service, &backend) && backend.port == flow->backend_port &&
	       address_equal(&backend.address, &flow->backend);
}

/* steer_datagram is steer() for sendmsg(): datagrams of one socket to one
 * Service stay with one backend for as long as it serves, as they would with
 * connection tracking; then the next datagram goes to another. */
static __always_inline int steer_datagram(struct bpf_sock_addr *ctx, const struct question *asked, struct decision *to)
{
	struct flow flow = {};
	struct service service = {};
	struct service_key own = asked->key;

	if (!find_service(&own, asked->origin == ORIGIN_NODE, &service) || left_to_packets(asked, service.path))
		return ALLOWED;
	struct sent_flows *flows = bpf_sk_storage_get(&sent, ctx->sk, 0, BPF_SK_STORAGE_GET_F_CREATE);

	if (flows && find_sent(flows, &asked->key, &flow) && still_serves(&flow, service.id)) {
		to->verdict = VERDICT_FORWARD;
		to->backend.address = flow.backend;
		to->backend.port = flow.backend_port;
		return ALLOWED;
	}
	if (handed_over())
		return ALLOWED;
	decide(asked, to);
	if (to->verdict == VERDICT_NOT_A_SERVICE)
		return ALLOWED;
	if (to->verdict != VERDICT_FORWARD)
		return turn_away(to);
	make_flow(&flow, &asked->key, to);
	if (!flows)
		count(REASON_NO_STORAGE);
	else if (keep_sent(flows, &flow))
		count(REASON_FLOW_FORGOTTEN);
	count(REASON_FORWARDED);
	return ALLOWED;
}

SEC("cgroup/sendmsg4")
int sendmsg4(struct bpf_sock_addr *ctx)
{
	struct question asked = question_of(ctx, address_from_ip4(ctx->user_ip4));
	struct decision to = {};
	int result = steer_datagram(ctx, &asked, &to);

	if (to.verdict == VERDICT_FORWARD) {
		ctx->user_ip4 = to.backend.address.word[3];
		ctx->user_port = to.backend.port;
	}
	return result;
}

SEC("cgroup/sendmsg6")
int sendmsg6(struct bpf_sock_addr *ctx)
{
	struct question asked = question_of(ctx, address_from_ip6(ctx));
	struct decision to = {};
	int result = steer_datagram(ctx, &asked, &to);

	if (to.verdict == VERDICT_FORWARD)
		write_ip6(ctx, &to.backend.address, to.backend.port);
	return result;
}

/* service_of finds the Service behind a peer address that the kernel is about
 * to show to the program. If one UDP socket has sent to two Services with the
 * same endpoint, it is the one it sent to last. */
static __always_inline bool service_of(struct bpf_sock_addr *ctx, const struct address *peer, struct flow *found)
{
	__be16 port = ctx->user_port;
	struct flow *flow = bpf_sk_storage_get(&connected, ctx->sk, 0, 0);

	if (flow && flow->backend_port == port && address_equal(&flow->backend, peer)) {
		*found = *flow;
		return true;
	}
	if (ctx->protocol != IPPROTO_UDP)
		return false;
	struct sent_flows *flows = bpf_sk_storage_get(&sent, ctx->sk, 0, 0);
	bool hit = false;

	if (!flows)
		return false;
	bpf_spin_lock(&flows->lock);
#pragma unroll
	for (int i = 0; i < SENT_FLOWS; i++) {
		if ((!hit || i == flows->last) && flows->flow[i].backend_port == port &&
		    address_equal(&flows->flow[i].backend, peer)) {
			*found = flows->flow[i];
			hit = true;
		}
	}
	bpf_spin_unlock(&flows->lock);
	return hit;
}

static __always_inline int show_service4(struct bpf_sock_addr *ctx)
{
	struct address peer = address_from_ip4(ctx->user_ip4);
	struct flow flow = {};

	if (service_of(ctx, &peer, &flow)) {
		ctx->user_ip4 = flow.service.word[3];
		ctx->user_port = flow.service_port;
	}
	return ALLOWED;
}

static __always_inline int show_service6(struct bpf_sock_addr *ctx)
{
	struct address peer = address_from_ip6(ctx);
	struct flow flow = {};

	if (service_of(ctx, &peer, &flow))
		write_ip6(ctx, &flow.service, flow.service_port);
	return ALLOWED;
}

SEC("cgroup/recvmsg4")
int recvmsg4(struct bpf_sock_addr *ctx)
{
	return show_service4(ctx);
}

SEC("cgroup/recvmsg6")
int recvmsg6(struct bpf_sock_addr *ctx)
{
	return show_service6(ctx);
}

SEC("cgroup/getpeername4")
int getpeername4(struct bpf_sock_addr *ctx)
{
	return show_service4(ctx);
}

SEC("cgroup/getpeername6")
int getpeername6(struct bpf_sock_addr *ctx)
{
	return show_service6(ctx);
}
