/* SPDX-License-Identifier: MIT OR GPL-2.0-only */
/* The kernel's types that the programs here use, and no others.
 *
 * They are user-space ABI (linux/bpf.h), so they never change; a kernel-internal
 * type added here must carry preserve_access_index, so that its offsets are
 * those of the running kernel (CO-RE).
 */
#pragma once

typedef unsigned char __u8;
typedef unsigned short __u16;
typedef unsigned int __u32;
typedef unsigned long long __u64;
typedef signed char __s8;
typedef short __s16;
typedef int __s32;
typedef long long __s64;
typedef __u16 __be16;
typedef __u32 __be32;
typedef __u32 __wsum;
typedef _Bool bool;
enum { false = 0, true = 1 };

enum bpf_map_type {
	BPF_MAP_TYPE_HASH = 1,
	BPF_MAP_TYPE_ARRAY = 2,
	BPF_MAP_TYPE_PERF_EVENT_ARRAY = 4,
	BPF_MAP_TYPE_PERCPU_HASH = 5,
	BPF_MAP_TYPE_PERCPU_ARRAY = 6,
	BPF_MAP_TYPE_LRU_HASH = 9,
	BPF_MAP_TYPE_LRU_PERCPU_HASH = 10,
	BPF_MAP_TYPE_LPM_TRIE = 11,
	BPF_MAP_TYPE_SOCKMAP = 15,
	BPF_MAP_TYPE_QUEUE = 22,
	BPF_MAP_TYPE_SK_STORAGE = 24,
	BPF_MAP_TYPE_RINGBUF = 27,
};

enum {
	BPF_ANY = 0,
	BPF_NOEXIST = 1,
	BPF_EXIST = 2,
};

enum {
	BPF_F_NO_PREALLOC = 1,
};

enum {
	BPF_SK_STORAGE_GET_F_CREATE = 1,
};

/* bpf_redirect() and bpf_clone_redirect(). */
enum {
	BPF_F_INGRESS = 1,
};

/* What a tc program answers (linux/pkt_cls.h): TC_ACT_UNSPEC, which tcx calls
 * TCX_NEXT, lets the next program see the packet. */
enum {
	TC_ACT_UNSPEC = -1,
	TC_ACT_OK = 0,
	TC_ACT_SHOT = 2,
};

/* struct __sk_buff.pkt_type (linux/if_packet.h). */
enum {
	PACKET_HOST = 0,
	PACKET_OTHERHOST = 3,
};

/* bpf_skb_store_bytes(), bpf_l4_csum_replace() and bpf_skb_adjust_room(). */
enum {
	BPF_F_RECOMPUTE_CSUM = 1 << 0,
	BPF_F_PSEUDO_HDR = 1 << 4,
	BPF_F_MARK_MANGLED_0 = 1 << 5,
	BPF_F_ADJ_ROOM_FIXED_GSO = 1 << 0,
	BPF_F_ADJ_ROOM_ENCAP_L3_IPV4 = 1 << 1,
	BPF_F_ADJ_ROOM_ENCAP_L3_IPV6 = 1 << 2,
	BPF_F_ADJ_ROOM_ENCAP_L4_UDP = 1 << 4,
	BPF_F_ADJ_ROOM_NO_CSUM_RESET = 1 << 5,
	BPF_F_ADJ_ROOM_ENCAP_L2_ETH = 1 << 6,
	BPF_F_ADJ_ROOM_DECAP_L3_IPV4 = 1 << 7, /* since Linux 6.3, as the next */
	BPF_F_ADJ_ROOM_DECAP_L3_IPV6 = 1 << 8,
	BPF_ADJ_ROOM_MAC = 1,
};

/* bpf_skb_load_bytes_relative(): from which header on. */
enum {
	BPF_HDR_START_NET = 1,
};

/* bpf_skb_adjust_room(): so long is the link-layer header inside. */
#define BPF_F_ADJ_ROOM_ENCAP_L2(length) ((__u64)(length) << 56)

/* bpf_csum_level(). */
enum {
	BPF_CSUM_LEVEL_DEC = 2,
};

/* bpf_redirect_neigh(): the next hop. */
struct bpf_redir_neigh {
	__u32 nh_family;
	__be32 next_hop[4]; /* IPv4 in the first */
};

struct bpf_spin_lock {
	__u32 val;
};

/* What a program sees of a socket. */
struct bpf_sock {
	__u32 bound_dev_if;
	__u32 family;
	__u32 type;
	__u32 protocol;
	__u32 mark;
	__u32 priority;
	__u32 src_ip4;
	__u32 src_ip6[4];
	__u32 src_port; /* in the host's order */
	__be16 dst_port;
	__u16 zero;
	__u32 dst_ip4;
	__u32 dst_ip6[4];
	__u32 state;
	__s32 rx_queue_mapping;
};

/* bpf_sk_lookup_tcp() and bpf_sk_lookup_udp(), with BPF_F_CURRENT_NETNS. */
struct bpf_sock_tuple {
	union {
		struct {
			__be32 saddr;
			__be32 daddr;
			__be16 sport;
			__be16 dport;
		} ipv4;
		struct {
			__be32 saddr[4];
			__be32 daddr[4];
			__be16 sport;
			__be16 dport;
		} ipv6;
	};
};

#define BPF_F_CURRENT_CPU   0xffffffffULL
#define BPF_F_CURRENT_NETNS (-1L)

/* A connection that the kernel tracks. None of its fields is used. */
struct nf_conn {
	unsigned long status;
} __attribute__((preserve_access_index));

/* bpf_skb_ct_lookup(). Linux 6.10 knows a longer one as well. */
struct bpf_ct_opts {
	__s32 netns_id;
	__s32 error;
	__u8 l4proto;
	__u8 dir;
	__u8 reserved[2];
};

/* bpf_fib_lookup(): what it is asked and what it answers. */
struct bpf_fib_lookup {
	__u8 family;
	__u8 l4_protocol;
	__be16 sport;
	__be16 dport;
	__u16 tot_len;
	__u32 ifindex;
	__be32 flowinfo;
	__be32 source[4]; /* IPv4 in the first */
	__be32 destination[4];
	__be16 h_vlan_proto;
	__be16 h_vlan_TCI;
	__u8 smac[6];
	__u8 dmac[6];
};

enum {
	BPF_FIB_LKUP_RET_SUCCESS = 0,
	BPF_FIB_LKUP_RET_NO_NEIGH = 7,
	BPF_FIB_LKUP_RET_FRAG_NEEDED = 8,
};

enum {
	AF_INET = 2,
	AF_INET6 = 10,
};

/* What a program at connect(), sendmsg(), recvmsg() and getpeername() sees.
 * Addresses and the port are in network byte order; the port is in the lower
 * 16 bits of user_port. */
struct bpf_sock_addr {
	__u32 user_family;
	__u32 user_ip4;
	__u32 user_ip6[4];
	__u32 user_port;
	__u32 family;
	__u32 type;
	__u32 protocol;
	__u32 msg_src_ip4;
	__u32 msg_src_ip6[4];
	struct bpf_sock *sk __attribute__((aligned(8)));
};

/* What a program at tc sees. */
struct __sk_buff {
	__u32 len;
	__u32 pkt_type;
	__u32 mark;
	__u32 queue_mapping;
	__u32 protocol;
	__u32 vlan_present;
	__u32 vlan_tci;
	__u32 vlan_proto;
	__u32 priority;
	__u32 ingress_ifindex;
	__u32 ifindex;
	__u32 tc_index;
	__u32 cb[5];
	__u32 hash;
	__u32 tc_classid;
	__u32 data;
	__u32 data_end;
	__u32 napi_id;
	__u32 family;
	__u32 remote_ip4;
	__u32 local_ip4;
	__u32 remote_ip6[4];
	__u32 local_ip6[4];
	__u32 remote_port;
	__u32 local_port;
	__u32 data_meta;
	struct bpf_flow_keys *flow_keys __attribute__((aligned(8)));
	__u64 tstamp;
	__u32 wire_len;
	__u32 gso_segs;
	struct bpf_sock *sk __attribute__((aligned(8)));
	__u32 gso_size;
};
