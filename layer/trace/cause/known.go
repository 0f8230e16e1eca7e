package cause

// The causes, by their stable identifiers.
const (
	ConntrackFull      = "conntrack-table-full"
	ConntrackInvalid   = "conntrack-invalid-drop" // a rule drops what tracking calls invalid
	SNATPortsExhausted = "snat-ports-exhausted"
	FirewallDrop       = "firewall-drop"
	FirewallReject     = "firewall-reject"
	ReversePath        = "reverse-path-filter"
	NoListener         = "no-listener"
	AcceptQueueFull    = "accept-queue-full"
	SYNQueueFull       = "syn-queue-full"
	SYNFlood           = "syn-flood" // answered with cookies
	NeighbourMissing   = "neighbour-unresolved"
	WrongMAC           = "wrong-mac-address"
	DuplicateMAC       = "duplicate-mac-address"
	LinkDown           = "link-down"
	DuplicateAddress   = "duplicate-address"
	RoutingLoop        = "routing-loop"
	ForwardingOff      = "forwarding-off"
	NoRoute            = "no-route"
	NoRouteBack        = "no-route-back"
	RouteBlackhole     = "route-blackhole"
	RouteUnreachable   = "route-unreachable"
	RouteProhibit      = "route-prohibit"
	MartianSource      = "martian-source"
	MTUBlackHole       = "mtu-black-hole"      // ICMP about it does not arrive
	MTUExceedsPeer     = "mtu-exceeds-peer"    // on the link itself: nobody tells
	VXLANFragments     = "vxlan-fragmentation" // its MTU is too large for what is below
	VXLANUnknownID     = "vxlan-unknown-vni"
	VXLANNoPeer        = "vxlan-no-forwarding-entry"
	VXLANPort          = "vxlan-port-mismatch"
	FragmentLost       = "fragment-lost"
	BadChecksum        = "bad-checksum"
	ReceiveBufferFull  = "receive-buffer-full"
	ReceiverStalled    = "receiver-stalled" // zero window
	ClosedUnread       = "closed-with-unread-data"
	PortsExhausted     = "local-ports-exhausted"
	PortInUse          = "port-in-use" // a certain one, that somebody has
	QdiscFull          = "qdisc-full"
	TCDrop             = "bpf-tc-drop"
	XDPDrop            = "bpf-xdp-drop"
	CgroupDrop         = "bpf-cgroup-drop"
	SocketFilterDrop   = "socket-filter-drop"
	OtherAnswer        = "answer-from-other-address"
	IPv6Off            = "ipv6-off"
	PingIgnored        = "ping-ignored"
	TCPSignature       = "tcp-signature"
	IPsecPolicy        = "ipsec-policy-drop"
	BridgePortBlocked  = "bridge-port-blocked"
	BridgeWrongPort    = "bridge-wrong-port"
	TrackingForgot     = "connection-forgotten" // by what translates it
	ServiceDrop        = "service-drop"         // millrace's own, with the Service's name
	MemoryShort        = "memory-short"
	BacklogFull        = "cpu-backlog-full"
	Unexplained        = "drop-unexplained"
)
