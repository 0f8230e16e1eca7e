package cause

import (
	"net/netip"
	"time"
)

// Evidence is what was seen in one window: events as they happened, and the state of
// each namespace at the window's two ends.
type Evidence struct {
	Window time.Duration
	Kernel string // its release: "6.18.0"
	Spaces []*Space
	Events []Event
	// Paths are what the kernel answers about the tuples of events and of connections
	// that did not come about.
	Paths []Path
	// Services are the addresses of Services, where somebody knows them.
	Services []Service
	// Missing are the signals that this kernel, or the rights of the process, do not
	// give, and why: "icmp_send: no such tracepoint".
	Missing []string
	// Passages are how long packets took that were asked for and went on; none where none
	// were asked for.
	Passages []Passage
	// Lost are events of which no example was kept; all are counted.
	Lost uint64
}

// Passage is how long packets took from one place to the next, of those that were seen at
// both.
type Passage struct {
	From, To Spot
	Packets  uint64
	// Mean and Longest are of the time between.
	Mean, Longest time.Duration
}

// Spot is where a packet was seen.
type Spot struct {
	Space uint32 // inode of the network namespace
	Index int    // of the device
	Point Point
}

// Point is what a packet does at a device.
type Point string

// The points, and the tracepoint of each.
const (
	Came   Point = "came"   // netif_receive_skb
	Queued Point = "queued" // net_dev_queue
	Left   Point = "left"   // net_dev_start_xmit
)

// Service is an address and a port of one.
type Service struct {
	// Name is "shop/web:http", without the last part where the port has no name.
	Name     string
	Protocol uint8
	// Address is 0.0.0.0 or :: for a port of the nodes.
	Address netip.AddrPort
	// Endpoints is how many it leads to now.
	Endpoints int
}

// Kind is what kind of event it is.
type Kind string

// The kinds of events, and the tracepoint or program that each comes from.
const (
	Drop         Kind = "drop"         // kfree_skb
	ResetSent    Kind = "reset"        // tcp_send_reset
	ICMPSent     Kind = "icmp"         // icmp_send; the packet is the one that it is about
	Retransmit   Kind = "retransmit"   // tcp_retransmit_skb
	SocketError  Kind = "socket-error" // inet_sk_error_report
	NeighFailed  Kind = "neigh-failed" // neigh_timer_handler, in state NUD_FAILED
	ReceiveFull  Kind = "receive-full" // sock_rcvqueue_full, udp_fail_queue_rcv_skb
	CallFailed   Kind = "call"         // sys_exit of connect, bind, sendto, sendmsg ...
	ChecksumFail Kind = "bad-checksum" // tcp_bad_csum
	StateChange  Kind = "socket-state" // inet_sock_set_state, where it says something
)

// Event is one thing that happened Count times with the same Kind, Space, Reason,
// Location, device and tuple (but for the client's port), and one example of it.
type Event struct {
	Kind  Kind
	Space uint32 // inode of the network namespace: that of the packet's device, else of its socket
	// Cookie is the lower half of that namespace's, which tells it from one that gets its
	// inode later; 0 where it is not known.
	Cookie uint32 `json:",omitempty"`
	Count  uint64
	// First and Last are from the beginning of the window.
	First, Last time.Duration
	// Reason is the kernel's own word, without its prefix: "NETFILTER_DROP", for resets
	// of enum sk_rst_reason. Empty where the kernel has none.
	Reason string
	// Location is the function that dropped, without offset: "nf_hook_slow". Stack are the
	// functions that called it, innermost first, where one was taken.
	Location string
	Stack    []string
	// Device is the one that the packet had; 0 and "" when it had none.
	Index  int
	Device string
	Tuple  Tuple
	// Packet is the beginning of an example from its network header on (a fragment, an
	// ARP message, a frame that is no IP likewise); Length what the whole of it had.
	Packet []byte
	Length int
	// MAC is the example's destination on the link; PacketType the kernel's PACKET_*.
	MAC        [6]byte
	PacketType int
	// Partial says that the example's TCP or UDP checksum is not filled in yet: the
	// device is to do so.
	Partial bool
	// Longest is the length of the longest of them, from the network header on.
	Longest int
	// GSO is the size of a segment of an example that is to be cut, or 0.
	GSO int
	// Type and Code are of ICMPSent (and in Tuple is what it is about).
	Type, Code int
	// Errno and Call are of CallFailed and SocketError: 99, "connect".
	Errno int
	Call  string
	// PID and Command are who called; Socket is the cookie of the packet's or receiving
	// socket, 0 if none.
	PID     int
	Command string
	Socket  uint64
	// OldState and NewState are of StateChange; OldState of Retransmit too: TCP_*
	// (12, TCP_NEW_SYN_RECV, where the answer to a SYN is repeated).
	OldState, NewState int
	// Crossed is of ResetSent by a program that closes with data unread: the data had
	// only just come, after a long silence, and all before had been read. The program
	// gave up an idle connection at the moment at which the other end used it again.
	Crossed bool
	// Retransmits is how often in a row the example's socket had sent again; of
	// SocketError, StateChange and Retransmit.
	Retransmits int
}

// Tuple are a packet's ends. Ports are 0 where the protocol has none.
type Tuple struct {
	Protocol    uint8 // IPPROTO_*
	Source      netip.AddrPort
	Destination netip.AddrPort
	Fragment    bool  // not the first part of a packet
	TCPFlags    uint8 // as in the header: SYN 2, RST 4, ACK 16
	EtherType   uint16
	ICMPType    uint8 // of a packet that is itself ICMP
	ICMPCode    uint8
}

// Space is one network namespace at both ends of the window.
type Space struct {
	Inode uint32
	Name  string // as the user knows it: a name below /run/netns, a pod's, "node"
	Pod   string // NAMESPACE/NAME, where known
	// Before and After are readings at the ends.
	Before, After Reading
	// Settings are files below /proc/sys/net, by name with dots: "net.ipv4.ip_forward".
	Settings map[string]string
	Addrs    []Addr
	Neighs   []Neigh
	Forwards []Forward
	Routes   []Route
	Rules    []Rule
	Programs []Program
	Policies []Policy
	// Processes say who holds sockets: by inode of the socket.
	Processes map[uint32]Process
	// Enter is what is put before a command for it to be given in this namespace:
	// "ip netns exec web", "nsenter --net=/proc/1234/ns/net", "" for the node's own.
	Enter string
}

// Process is somebody who has sockets.
type Process struct {
	PID     int
	Command string
	Pod     string
}

// Reading is what changes in a namespace.
type Reading struct {
	// Counters are those of /proc/net/snmp, snmp6 and netstat: "TcpExt.ListenOverflows",
	// "Ip.InNoRoutes", "Ip6InNoRoutes".
	Counters  map[string]uint64
	Conntrack Conntrack
	Links     []Link
	// Sockets are those that can matter: all that listen, UDP and raw ones, and TCP
	// connections that do not get on.
	Sockets []Socket
	// Busy are the remote ends with the most TCP connections, those in TIME-WAIT too, and
	// remote ends of UDP likewise.
	Busy []Busy
	// Fragments is how many packets wait for the rest of their parts.
	Fragments uint64
}

// Busy is how many local ports are taken towards one remote end.
type Busy struct {
	Protocol uint8
	Local    netip.Addr
	Remote   netip.AddrPort
	Ports    int
}

// Route is one that lets nothing through, or a rule (ip-rule(8)) that does so: type
// blackhole, unreachable or prohibit.
type Route struct {
	Type string
	// To is where it leads, the zero value of a rule.
	To netip.Prefix
	// Text is it as a person would write it: "blackhole 10.2.0.0/16 table main".
	Text string
	Rule bool
}

// Policy is one of IPsec that blocks.
type Policy struct {
	From, To netip.Prefix
	Protocol uint8  // 0 for any
	Port     uint16 // to which; 0 for any
	Text     string // as ip-xfrm(8) selects it: "src 10.0.0.1/32 dst 10.0.0.2/32 dir in"
}

// Conntrack is the connection tracking of a namespace; Max is 0 where there is none.
type Conntrack struct {
	Count, Max                             uint64
	Drop, InsertFailed, EarlyDrop, Invalid uint64
}

// Link is a device.
type Link struct {
	Index       int
	Name        string
	Kind        string // "veth", "vxlan", "bridge", "" for a real one
	MAC         [6]byte
	MTU         int
	Up, Carrier bool
	Master      int    // the bridge that it is a port of
	PortState   string // of a bridge's port: "disabled", "blocking", "listening", "learning", "forwarding"
	Isolated    bool   // of a bridge's port: takes nothing from, and gives nothing to, other isolated ones
	// Withheld is what a bridge's port is not given although it is for all, as bridge(8)
	// calls it: "flood", "mcast_flood", "bcast_flood".
	Withheld  []string
	Peer      int    // index of a veth's other end
	PeerSpace uint32 // its namespace, where it could be told; else 0
	VXLAN     *VXLAN
	// Statistics by their kernel's name: "tx_dropped", "rx_errors"; of ethtool -S likewise,
	// after "ethtool.": "ethtool.rx_queue_0_xdp_drops".
	Statistics map[string]uint64
	Qdiscs     []Qdisc
}

// VXLAN is what a vxlan device is set to.
type VXLAN struct {
	ID, Port, Underlay int // Underlay is the index of its device, or 0
	Local, Group       netip.Addr
	Learning, External bool
	// Peers are where its forwarding entries lead to, by MAC ("0a:58:0a:01:00:02"); "00:00:00:00:00:00" is for all else.
	Peers map[string][]netip.Addr
}

// Qdisc is a queueing discipline with its counters.
type Qdisc struct {
	Kind              string
	Handle, Parent    uint32
	Drops, Overlimits uint64
	Packets           uint64 // that it let through
	Backlog, Queue    uint32
	Limit             uint32
	Rate              uint64 // bytes a second, where it has one
}

// Socket is one of TCP, UDP or raw.
type Socket struct {
	Protocol      uint8
	Local, Remote netip.AddrPort
	State         int // TCP_*
	Inode         uint32
	Cookie        uint64
	Cgroup        uint64 // inode of its cgroup, 0 if not known
	// ReceiveQueue and SendQueue are bytes; of a listener connections that wait to be
	// accepted, and how many may.
	ReceiveQueue, SendQueue   int
	Drops                     uint64 // SKMEMINFO
	ReceiveBuffer             int
	Retransmits               int  // in a row, now; of one that probes, its probes without an answer
	Backoff                   int  // how often that time was doubled
	Probing                   bool // its timer is that of a window that is zero
	Idle                      bool // a second look, half a second later, found its queues as they were
	MSS, PathMTU              int
	TotalRetransmits          uint64
	BytesAcked, BytesReceived uint64
	ReceiveWindow, SendWindow int // ReceiveWindow is negative where the kernel does not say it, before Linux 6.2
	LastSent, LastReceived    time.Duration
	RTT                       time.Duration
}

// Addr is an address of a namespace.
type Addr struct {
	Index  int
	Prefix netip.Prefix
	// Duplicate says that another host has it, by duplicate address detection of IPv6.
	Duplicate bool
}

// Neigh is an entry of the neighbour tables at the window's end.
type Neigh struct {
	Index int
	Addr  netip.Addr
	MAC   [6]byte
	State int // NUD_*
}

// Forward is an entry of a bridge's forwarding table at the window's end: by which port
// frames for a hardware address leave.
type Forward struct {
	Bridge, Port int // indexes of devices
	MAC          [6]byte
	VLAN         int // 0 for none
	// Fixed says that somebody put it in, and the bridge does not learn better (sticky or
	// local); Local that such frames are for the bridge's own host.
	Fixed, Local bool
}

// Rule is a firewall's rule, or a chain's policy, that can drop, refuse or translate.
type Rule struct {
	System       string // "nftables", "iptables-nft", "iptables-legacy"
	Family       string // "ip", "ip6", "inet", "bridge", "netdev"
	Table, Chain string
	Hook         string // "prerouting", "input" ...: those of the chains that lead to it, "" if none
	Handle       uint64 // of nftables; of iptables-legacy the place in its chain from 1
	Policy       bool
	Verdict      string // "drop", "reject", "reject with tcp reset", "snat", "masquerade" ...
	Text         string // as a person would write it
	Comment      string
	// States are the conntrack states that it asks for: "invalid".
	States        []string
	HasCounter    bool
	Before, After uint64 // packets
	// Rate says that the rule is about how much comes: packets that fit may pass it.
	Rate bool
	// Matches says whether the rule's own conditions fit a packet that came and goes by
	// these devices: yes, no, or not known. Nil where it could not be read.
	Matches func(packet []byte, in, out string) Fit `json:"-"`
}

// Fit is how a rule's conditions fit a packet.
type Fit int

// Whether a rule fits.
const (
	Unknown Fit = iota
	Yes
	No
)

// Program is an eBPF program that is attached where it can drop.
type Program struct {
	ID     uint32
	Name   string
	Type   string // "sched_cls", "xdp", "cgroup_skb", "socket_filter" ...
	Hook   string // "tc ingress", "tc egress", "xdp", "xdp generic", "cgroup egress"
	Device string
	Pref   uint32 // of a tc filter, 0 for tcx
	Cgroup string // the folder of its cgroup
	Attach string // what bpftool(8) calls the place in it: "connect6"
	Owner  string // who it is of, where its pin, link or name tells: "cilium", "millrace"
}

// Path is what the kernel answers when it is asked for a route (RTM_GETROUTE).
type Path struct {
	Space uint32
	// From is the device that the packet came by, "" for one that is sent here.
	From                string
	Source, Destination netip.Addr
	Mark                uint32
	// Type is the kernel's RTN_*: "unicast", "local", "blackhole", "unreachable",
	// "prohibit", "broadcast"; "" if there is no route.
	Type    string
	Errno   int // what it refused with, else 0
	Device  string
	Gateway netip.Addr
	MTU     int
	// Route is the one that it came from, as a person would write it:
	// "blackhole 10.2.0.0/16 table main".
	Route string
}
