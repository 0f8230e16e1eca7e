//go:build ignore

// SPDX-License-Identifier: MIT OR GPL-2.0-only
/* The packet path: what a client sends to a Service goes to a backend, and what
 * the backend answers comes from the Service. It is complete by itself, for
 * those whose sockets are not served: sidecars, virtual machines, raw sockets, and
 * clients on other machines.
 *
 * from_pod sees what a pod sends, from_wire what comes from elsewhere, before
 * routing and before netfilter; to_pod and to_wire what a pod and others get, after
 * them. So the host's stack, connection tracking included,
 * sees one consistent flow between the client and the backend, and no reply that
 * it would call INVALID (kube-proxy drops those).
 */
#include "../../bpf/fragment.h"
#include "../../bpf/packet.h"
#include "../../bpf/rewrite.h"
#include "masquerade.h"
#include "refuse.h"
#include "service.h"
#include "translation.h"

static __always_inline void mark_reset(struct translation *entry, bool reset)
{
	if (reset)
		__sync_fetch_and_or(&entry->flags, SEEN_RST);
	else
		__sync_fetch_and_and(&entry->flags, ~SEEN_RST);
}

/* note_reset notes in both entries of a flow that it was reset, or, when another
 * packet follows, that it was not: an end that does not heed a reset, for it is old
 * or forged, answers (RFC 5961, 3.2), and one that is really gone resets again. */
__noinline int note_reset(int reset)
{
	struct workbench *w = workbench(OF_PACKETS);

	if (!w)
		return 0;
	struct translation *entry = bpf_map_lookup_elem(&translations, &w->packet.tuple);

	if (!entry)
		return 0;
	mark_reset(entry, reset);
	reverse(&entry->to, &w->back);
	entry = bpf_map_lookup_elem(&translations, &w->back);
	if (entry)
		mark_reset(entry, reset);
	return 0;
}

/* note remembers what a packet says of its flow. Most packets write nothing. */
static __always_inline void note(struct translation *entry, const struct packet *p)
{
	bool reset = p->tcp_flags & TCP_RST;
	__u32 now = seconds();

	if (entry->seen != now) {
		entry->seen = now;
		if (!(entry->flags & SEEN_LATER))
			__sync_fetch_and_or(&entry->flags, SEEN_LATER);
	}
	if (p->tcp_flags & TCP_FIN)
		__sync_fetch_and_or(&entry->flags, SEEN_FIN);
	if (reset != !!(entry->flags & SEEN_RST))
		note_reset(reset);
}

/* answered notes in a reply's entry that there are replies. */
static __always_inline void answered(const struct tuple *reply)
{
	struct translation *entry = bpf_map_lookup_elem(&translations, reply);

	if (entry)
		__sync_fetch_and_or(&entry->flags, SEEN_REPLY);
}

/* find_translation copies the entry for a tuple, and notes the packet in it. */
static __always_inline bool find_translation(const struct packet *p, struct translation *copy)
{
	struct translation *entry = bpf_map_lookup_elem(&translations, &p->tuple);

	if (!entry)
		return false;
	*copy = *entry;
	if (!is_for(copy, &p->tuple))
		return false;
	note(entry, p);
	return true;
}

/* How many source ports are tried where the client's own leads to a clash. */
#define CLASH_TRIES 4

/* The pods' network namespaces, as numbers of the node's own (ip-netns(8), list-id). */
struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__type(key, __u32); /* the index of the pod's device */
	__type(value, __u32);
	__uint(max_entries, 4096); /* pods of one node; Kubernetes plans for 110 */
	__uint(map_flags, BPF_F_NO_PREALLOC);
} spaces SEC(".maps");

/* goes_direct says whether a socket of the pod is connected to the endpoint itself
 * from the port of the flow on the workbench: its answers would be taken for the
 * flow's. */
__noinline int goes_direct(struct __sk_buff *skb)
{
	struct workbench *w = workbench(OF_PACKETS);
	__u32 device = skb->ifindex, *space;

	if (!w || w->by_wire || !w->client.service)
		return false;
	space = bpf_map_lookup_elem(&spaces, &device);
	return space && socket_for(skb, &w->back, *space) == SOCKET_CONNECTED;
}

/* make_reply makes the entry for the replies. A client may reach one endpoint
 * through two Services from one port, or through a Service and without: then the
 * endpoint would take two flows for one. Another source port parts them. */
__noinline int make_reply(struct __sk_buff *skb)
{
	struct workbench *w = workbench(OF_PACKETS);
	int error = -EEXIST;

	if (!w)
		return -1;
	__builtin_memset(&w->reply, 0, sizeof(w->reply));
	w->reply.service = w->client.service;
	w->reply.number = w->client.number;
	w->reply.seen = w->client.seen;
	w->reply.role = w->client.role == ROLE_HAIRPIN ? ROLE_HAIRPIN : ROLE_TO_POD;
	w->reply.flags = w->client.role == ROLE_HAIRPIN ? SEEN_REPLY : 0;
	reverse(&w->from, &w->reply.to);
	for (int i = 0; i < CLASH_TRIES; i++) {
		if (i > 0)
			w->client.to.source_port = __builtin_bswap16(1024 + bpf_get_prandom_u32() % (65536 - 1024));
		reverse(&w->client.to, &w->back);
		w->reply.was = short_of(&w->back);
		if (goes_direct(skb))
			continue;
		error = bpf_map_update_elem(&translations, &w->back, &w->reply, BPF_NOEXIST);
		if (error != -EEXIST)
			break;
		struct translation *other = bpf_map_lookup_elem(&translations, &w->back);

		/* ours, of the same two before */
		if (other && tuple_equal(&other->to, &w->reply.to)) {
			error = bpf_map_update_elem(&translations, &w->back, &w->reply, BPF_ANY);
			break;
		}
	}
	return error;
}

/* make_client makes the entry for the client's packets. With again it takes the
 * place of the one that is there. */
__noinline int make_client(int again)
{
	struct workbench *w = workbench(OF_PACKETS);
	int error = -ENOENT;

	if (!w)
		return -1;
	if (again)
		error = bpf_map_update_elem(&translations, &w->from, &w->client, BPF_EXIST);
	if (error != -ENOENT)
		return error;
	if (!take_place())
		return -1;
	error = bpf_map_update_elem(&translations, &w->from, &w->client, BPF_NOEXIST);
	if (!error)
		count_flow(1);
	return error;
}

/* find_before notes where the replies come from of the flow that begins anew. */
__noinline int find_before(void)
{
	struct workbench *w = workbench(OF_PACKETS);

	if (!w)
		return 0;
	struct translation *client = bpf_map_lookup_elem(&translations, &w->from);

	if (client)
		reverse(&client->to, &w->before);
	else
		w->before.protocol = 0; /* no entry has this key */
	return 0;
}

/* begin_flow makes both entries of the flow on the workbench. It returns
 * VERDICT_FORWARD, or VERDICT_DROP. Replies come first: none may pass
 * untranslated. */
__noinline int begin_flow(struct __sk_buff *skb, int again)
{
	struct workbench *w = workbench(OF_PACKETS);

	if (!w)
		return VERDICT_DROP;
	w->client.seen = seconds();
	w->client.was = short_of(&w->from);
	if (again)
		find_before();
	w->made = false;
	int error = make_reply(skb);

	if (error) {
		count(error == -EEXIST ? REASON_FLOW_CLASH : REASON_NO_STORAGE);
		return VERDICT_DROP;
	}
	if (w->by_wire && w->decision.masquerade && make_masquerade(skb)) {
		bpf_map_delete_elem(&translations, &w->back);
		return VERDICT_DROP;
	}
	error = make_client(again);
	if (!error) {
		if (again && !tuple_equal(&w->before, &w->back)) {
			reverse(&w->before, &w->ended);
			drop_masquerade(w);
			drop_reply(&w->before, &w->from, &w->origin);
		}
		count(REASON_FORWARDED);
		return VERDICT_FORWARD;
	}
	struct translation *other = bpf_map_lookup_elem(&translations, &w->from);

	if (error == -EEXIST && other) {
		/* The same flow's next packet was faster, on another CPU. */
		if (!tuple_equal(&other->to, &w->client.to)) {
			unmake_masquerade(w);
			bpf_map_delete_elem(&translations, &w->back);
		}
		w->client = *other;
		return VERDICT_FORWARD;
	}
	unmake_masquerade(w);
	bpf_map_delete_elem(&translations, &w->back);
	count(error == -1 ? REASON_FLOWS_FULL : REASON_NO_STORAGE);
	return VERDICT_DROP;
}

/* lay_client lays a new flow on the workbench that changes nothing yet. */
static __always_inline void lay_client(struct workbench *w, const struct packet *p)
{
	w->from = p->tuple;
	__builtin_memset(&w->client, 0, sizeof(w->client));
	w->client.to = p->tuple;
	w->client.role = ROLE_FROM_POD;
}

/* ask lays the question whether a packet is for a Service on the workbench. */
static __always_inline void ask(struct workbench *w, const struct packet *p)
{
	w->asked.key.address = p->tuple.destination;
	w->asked.key.port = p->tuple.destination_port;
	w->asked.key.protocol = p->tuple.protocol;
	w->asked.client = p->tuple.source;
	w->asked.origin = w->by_wire ? ORIGIN_OUTSIDE : ORIGIN_POD;
	w->asked.cookie = 0;
}

/* open_flow decides for a packet without a flow, or whose flow must begin anew. */
__noinline int open_flow(struct __sk_buff *skb, const struct packet *p, struct translation *to, int again)
{
	struct workbench *w = workbench(OF_PACKETS);

	if (!p || !to || !w)
		return VERDICT_NOT_A_SERVICE;
	ask(w, p);
	struct decision *decision = &w->decision;
	int verdict = decide(&w->asked, decision);

	/* An answer to the node itself, from a port that is a node port, too: a
	 * connected socket waits for it. */
	if (verdict != VERDICT_NOT_A_SERVICE && w->by_wire && p->tuple.protocol == IPPROTO_UDP &&
	    socket_for(skb, &p->tuple, BPF_F_CURRENT_NETNS) == SOCKET_CONNECTED)
		return VERDICT_NOT_A_SERVICE;
	if (verdict != VERDICT_FORWARD) {
		if (verdict != VERDICT_NOT_A_SERVICE)
			count(decision->reason);
		return verdict;
	}
	lay_client(w, p);
	w->client.to.destination = decision->backend.address;
	w->client.to.destination_port = decision->backend.port;
	w->client.service = decision->service;
	w->client.number = decision->number;
	if (!w->by_wire && address_equal(&decision->backend.address, &p->tuple.source)) {
		/* The pod itself. It would not take a packet from its own address, so
		 * this one comes from the Service. */
		w->client.to.source = p->tuple.destination;
		w->client.role = ROLE_HAIRPIN;
	}
	verdict = begin_flow(skb, again);
	if (verdict == VERDICT_FORWARD)
		*to = w->client;
	return verdict;
}

/* keep_apart gives a connection without a Service another source port where its
 * answers would be taken for those of a flow: the pod talks, or has talked, by a
 * Service to the same endpoint from the same port. */
__noinline int keep_apart(struct __sk_buff *skb, const struct packet *p, struct translation *to, int again)
{
	struct workbench *w = workbench(OF_PACKETS);

	if (!p || !to || !w)
		return VERDICT_NOT_A_SERVICE;
	reverse(&p->tuple, &w->back);
	struct translation *taken = bpf_map_lookup_elem(&translations, &w->back);

	if (again ? to->service != 0 : !taken || taken->role != ROLE_TO_POD)
		return VERDICT_NOT_A_SERVICE;
	lay_client(w, p);
	w->decision.masquerade = false;
	int verdict = begin_flow(skb, again);

	if (verdict == VERDICT_FORWARD)
		*to = w->client;
	return verdict;
}

/* serves says whether a client's flow leads to a backend that is there. Numbers
 * alone do not tell: after a restart one may be given again. Here an entry that was
 * replaced while it was read does no harm: the next datagram is asked again. */
static __always_inline bool serves(const struct translation *client)
{
	__u32 number = client->number;

	if (!client->service) /* keep_apart() */
		return true;
	struct backend *backend = bpf_map_lookup_elem(&backends, &number);

	return backend && backend->service == client->service && backend->port == client->to.destination_port &&
	       address_equal(&backend->address, &client->to.destination);
}

/* begins_anew says whether a packet of a known flow is the first of another:
 * a SYN after the end, or of a backend that is gone; a datagram whose backend is
 * gone. */
static __always_inline bool begins_anew(const struct packet *p, const struct translation *client)
{
	if (client->role == ROLE_TO_POD || client->flags & SEEN_REPLY) /* it is a reply */
		return false;
	if (p->tuple.protocol == IPPROTO_UDP)
		return !serves(client);
	if ((p->tcp_flags & (TCP_SYN | TCP_ACK)) != TCP_SYN)
		return false;
	return client->flags & (SEEN_FIN | SEEN_RST | SEEN_GONE) || !serves(client);
}

/* goes_on says what becomes of a packet of a known flow. What a client sends to an
 * endpoint that is gone is answered with a reset; its own reset still goes there, for
 * the endpoint may live and not be the Service's any more. */
static __always_inline int goes_on(const struct packet *p, const struct translation *entry)
{
	if (entry->role == ROLE_TO_POD)
		return VERDICT_NOT_A_SERVICE;
	if (!(entry->flags & SEEN_GONE) || p->tcp_flags & TCP_RST)
		return VERDICT_FORWARD;
	note_reset(true);
	return VERDICT_REFUSE;
}

/* client_flow finds or makes the flow of a packet that a client sends. */
static __always_inline int client_flow(struct __sk_buff *skb, const struct packet *p, struct translation *to)
{
	bool found = find_translation(p, to);

	if (found && !begins_anew(p, to))
		return goes_on(p, to);
	/* Without a flow only a SYN begins one: what else comes belongs to a
	 * connection that somebody else translates, or nobody. */
	if (p->tuple.protocol == IPPROTO_TCP && (p->tcp_flags & (TCP_SYN | TCP_ACK)) != TCP_SYN)
		return VERDICT_NOT_A_SERVICE;
	if (handed_over()) {
		if (found && !bpf_map_delete_elem(&translations, &p->tuple))
			count_flow(-1);
		return VERDICT_NOT_A_SERVICE;
	}
	int verdict = open_flow(skb, p, to, found);

	if (verdict == VERDICT_NOT_A_SERVICE && p->tuple.protocol == IPPROTO_TCP)
		return keep_apart(skb, p, to, found);
	return verdict;
}

/* find_way copies what becomes of the packets of a tuple, and says whether they are
 * translated where they come in. */
static __always_inline bool find_way(const struct tuple *key, struct translation *copy)
{
	struct translation *entry = bpf_map_lookup_elem(&translations, key);

	if (entry) {
		*copy = *entry;
		return is_for(copy, key);
	}
	struct masquerade *beside = bpf_map_lookup_elem(&masquerades, key);

	if (!beside)
		return false;
	copy->to = beside->to;
	copy->role = address_equal(&key->destination, &beside->to.destination) ? ROLE_TO_POD : ROLE_FROM_POD;
	return beside->was == short_of(key);
}

/* error_in translates an ICMP error that comes in, about what went out: a pod's
 * about a reply, for it got that from the Service, and the backend sent it; or a
 * router's. */
__noinline int error_in(struct __sk_buff *skb)
{
	struct workbench *w = workbench(OF_PACKETS);

	if (!w)
		return TC_ACT_UNSPEC;
	const struct packet *p = &w->packet;
	struct translation *to = &w->to;

	reverse(&p->tuple, &w->from);
	if (!find_way(&w->from, to) || to->role == ROLE_TO_POD)
		return TC_ACT_UNSPEC;
	reverse(&to->to, &w->back);
	if (!rewrite_error(skb, p, &w->back, to->role == ROLE_HAIRPIN ? &to->to.source : &p->outer_source,
			   address_equal(&p->outer_destination, &p->tuple.source) ? &w->back.source
										  : &p->outer_destination))
		return TC_ACT_SHOT;
	return to->role == ROLE_HAIRPIN ? send_back(skb, p) : TC_ACT_UNSPEC;
}

/* error_out translates an ICMP error that goes out, about what came in: a router's,
 * or the backend's own. */
__noinline int error_out(struct __sk_buff *skb)
{
	struct workbench *w = workbench(OF_PACKETS);

	if (!w)
		return TC_ACT_UNSPEC;
	const struct packet *p = &w->packet;
	struct translation *to = &w->to;

	reverse(&p->tuple, &w->from);
	if (!find_way(&w->from, to) || to->role != ROLE_TO_POD)
		return TC_ACT_UNSPEC;
	reverse(&to->to, &w->back);
	if (!rewrite_error(skb, p, &w->back,
			   address_equal(&p->outer_source, &p->tuple.destination) ? &w->back.destination
										  : &p->outer_source,
			   &p->outer_destination))
		return TC_ACT_SHOT;
	return TC_ACT_UNSPEC;
}

static __always_inline int unwritable(void)
{
	count(REASON_UNWRITABLE);
	return TC_ACT_SHOT;
}

/* come_in does what is to be done where a packet comes in. */
static __always_inline int come_in(struct __sk_buff *skb, struct workbench *w)
{
	struct packet *p = &w->packet;
	struct translation *to = &w->to;
	int verdict = client_flow(skb, p, to);

	if (verdict == VERDICT_NOT_A_SERVICE)
		return TC_ACT_UNSPEC;
	if (verdict == VERDICT_REFUSE)
		return refuse_packet(skb, p);
	if (verdict == VERDICT_DROP)
		return TC_ACT_SHOT;
	if (p->shape == SHAPE_FIRST)
		keep_fragment(p, false);
	if (!rewrite(skb, p, &to->to))
		return unwritable();
	return to->role == ROLE_HAIRPIN ? send_back(skb, p) : TC_ACT_UNSPEC;
}

/* go_out does what is to be done where a packet goes out, if it is an answer. */
static __always_inline bool go_out(struct workbench *w)
{
	struct packet *p = &w->packet;
	struct translation *to = &w->to;

	if (!find_translation(p, to) || to->role != ROLE_TO_POD)
		return false;
	if (!(to->flags & SEEN_REPLY))
		answered(&p->tuple);
	return true;
}

static __always_inline int write_out(struct __sk_buff *skb, const struct packet *p, const struct tuple *to, bool out)
{
	if (p->shape == SHAPE_FIRST)
		keep_fragment(p, out);
	return rewrite(skb, p, to) ? TC_ACT_UNSPEC : unwritable();
}

SEC("tcx/ingress")
int from_pod(struct __sk_buff *skb)
{
	struct workbench *w = workbench(OF_PACKETS);

	if (!w)
		return TC_ACT_SHOT;
	w->by_wire = false;
	read_packet(skb, &w->packet, ETHERNET_LENGTH);
	if (w->packet.shape == SHAPE_ERROR)
		return error_in(skb);
	if (!has_tuple(&w->packet, false))
		return TC_ACT_UNSPEC;
	return come_in(skb, w);
}

SEC("tcx/egress")
int to_pod(struct __sk_buff *skb)
{
	struct workbench *w = workbench(OF_PACKETS);

	if (!w)
		return TC_ACT_SHOT;
	read_packet(skb, &w->packet, ETHERNET_LENGTH);
	if (w->packet.shape == SHAPE_ERROR)
		return error_out(skb);
	if (!has_tuple(&w->packet, true) || !go_out(w))
		return TC_ACT_UNSPEC;
	return write_out(skb, &w->packet, &w->to.to, true);
}

/* wire_in is from_wire, at a device whose packets have so much before the IP header. */
static __always_inline int wire_in(struct __sk_buff *skb, __u32 frame)
{
	struct workbench *w = workbench(OF_PACKETS);

	if (!w)
		return TC_ACT_SHOT;
	if (skb->pkt_type == PACKET_OTHERHOST || of_vlan(skb))
		return TC_ACT_UNSPEC; /* a switch that floods: it is another machine's */
	w->by_wire = true;
	read_packet(skb, &w->packet, frame);
	if (w->packet.shape == SHAPE_ERROR)
		return error_in(skb);
	if (!has_tuple(&w->packet, false))
		return TC_ACT_UNSPEC;
	if (find_masquerade(&w->packet.tuple, false, &w->in)) /* an answer to the node */
		return write_out(skb, &w->packet, &w->in.to, false);
	return come_in(skb, w);
}

static __always_inline int wire_out(struct __sk_buff *skb, __u32 frame)
{
	struct workbench *w = workbench(OF_PACKETS);

	if (!w)
		return TC_ACT_SHOT;
	if (of_vlan(skb))
		return TC_ACT_UNSPEC;
	read_packet(skb, &w->packet, frame);
	if (w->packet.shape == SHAPE_ERROR)
		return error_out(skb);
	if (!has_tuple(&w->packet, true))
		return TC_ACT_UNSPEC;
	if (go_out(w))
		return write_out(skb, &w->packet, &w->to.to, true);
	if (find_masquerade(&w->packet.tuple, true, &w->out))
		return write_out(skb, &w->packet, &w->out.to, true);
	return TC_ACT_UNSPEC;
}

SEC("tcx/ingress")
int from_wire(struct __sk_buff *skb)
{
	return wire_in(skb, ETHERNET_LENGTH);
}

SEC("tcx/egress")
int to_wire(struct __sk_buff *skb)
{
	return wire_out(skb, ETHERNET_LENGTH);
}

/* The same at devices that carry IP packets and nothing before them: WireGuard, IPIP,
 * tun, PPP. */
SEC("tcx/ingress")
int from_wire_l3(struct __sk_buff *skb)
{
	return wire_in(skb, 0);
}

SEC("tcx/egress")
int to_wire_l3(struct __sk_buff *skb)
{
	return wire_out(skb, 0);
}

/* sweep clears expired flows away. The frame holds, after the Ethernet header, the
 * first place and whether flows that can be spared are cleared away, too. It is
 * run by the agent, never attached. */
#define SWEEP_PLACES 256

SEC("tc")
int sweep(struct __sk_buff *skb)
{
	__u32 *order = (void *)(long)skb->data + ETHERNET_LENGTH;

	if ((void *)(order + 2) > (void *)(long)skb->data_end)
		return -1;
	__u32 first = order[0], pressed = order[1];

	for (__u32 i = 0; i < SWEEP_PLACES; i++) {
		__u32 place = (first + i) & places_mask;

		if (vacate(place, pressed, OF_SWEEP) == PLACE_FREED)
			bpf_map_push_elem(&vacant, &place, 0);
	}
	return 0;
}

/* end_flow notes that the endpoint of a flow is gone. The frame holds, after the
 * Ethernet header, what the client sends and what that becomes: if this is another
 * flow by now, or has ended, it is left alone, and 0 is returned. It is run by the
 * agent, never attached. */
struct flow_end {
	struct tuple from;
	struct tuple to;
};

SEC("tc")
int end_flow(struct __sk_buff *skb)
{
	struct flow_end end;
	struct tuple back;
	struct translation *entry, *reply;

	if (bpf_skb_load_bytes(skb, ETHERNET_LENGTH, &end, sizeof(end)))
		return false;
	entry = bpf_map_lookup_elem(&translations, &end.from);
	if (!entry || !is_for(entry, &end.from) || !tuple_equal(&entry->to, &end.to))
		return false;
	reverse(&end.to, &back);
	reply = bpf_map_lookup_elem(&translations, &back);
	if (entry->flags & SEEN_RST || (reply && entry->flags & reply->flags & SEEN_FIN))
		return false;
	__sync_fetch_and_or(&entry->flags, SEEN_GONE);
	return true;
}

/* ask_conntrack asks the kernel about the tuple that the frame holds after the Ethernet
 * header. It is loaded to find out whether that can be done, and run to measure it;
 * never attached. */
SEC("tc")
int ask_conntrack(struct __sk_buff *skb)
{
	struct tuple incoming;

	return !bpf_skb_load_bytes(skb, ETHERNET_LENGTH, &incoming, sizeof(incoming)) && asks_conntrack &&
	       is_tracked(skb, &incoming);
}
