// Package route brings packets to the pods of other nodes.
//
// For each range of another node's pods it chooses the best way, and says why: direct
// where the node is on the same segment; else VXLAN (RFC 7348). VXLAN is written and read
// by eBPF programs at tc: no packet between pods goes through a vxlan device, and large
// packets stay whole (GSO). On the wire it is the kernel's, so the other end may be a plain
// node. Direct ways are routes, and from Linux 6.6 on pods' packets go past the stack by
// the same programs: from the veth to the uplink, from the uplink to the pod.
//
// What goes past the stack does so in both directions or not at all: while a rule of others
// needs to see pods' packets (connection tracking, translation), the programs leave all to
// the stack. Packets of the node itself, and from outside the cluster, always go there.
//
// A vxlan device of the kernel, "millrace", is there all the same: by it goes what the
// node's own stack sends to pods elsewhere, and what it is to see of what comes. It has
// the first address of each of the node's pod ranges, its programs write whom frames are
// for, and it learns nothing. The hardware address is made of the node's first address
// (IPv4 before IPv6), so that nodes need not tell each other.
//
// Where flannel is in the cluster, its nodes are reached as their annotations ask, all nodes
// speak its port and number, and ToFlannel is what this node's annotations are to say. A
// node where flannel's device is is left to it until a person says that flannel has gone.
//
// A packet that is too long is left to the stack, which tells the sender (ICMP). Between
// two hops the packet inside loses one hop at each node, as it would without VXLAN.
// Congestion bits follow RFC 6040, normal mode; the class of service is copied outwards.
// UDP checksums are 0 outside, over IPv6 as RFC 6935 allows: a plain node there needs
// udp6zerocsumrx. Packets of our network from addresses that are no node's are dropped.
//
// How long packets to a node may be is measured between the nodes, once a minute, and
// routes and programs keep to it: what something on the way drops in silence, this node
// answers for.
//
// A segment is asked whether it carries packets of pods' addresses, which clouds' fabrics drop:
// where nodes' are answered and pods' are not, both nodes go over to VXLAN, neither before the
// other takes it, and come back together.
//
// What it writes in the kernel: routes with protocol number 110 and metric 110, so that
// others' to the same range win; the device; six maps, and a program and a link for each
// pod's veth and each uplink (before Linux 6.6 clsact filters), pinned in a folder of its
// own. What goes by the programs passes no forwarding rules of the host.
//
// What it costs: 76 bytes and the kernel's overhead for each range; each packet of a pod
// is looked up by its two ends, each that comes by an uplink by its sender; two packets to
// each node a minute. Who listens for what segments are asked pays for each packet that
// reaches the stack, so that this is 10 s in 10 minutes where all is well.
//
// Off means gone: Remove takes routes, device, links, maps and the folder away.
//
// Not here yet: policy routing (only the main table is read), masquerading, learned routes,
// uplinks without Ethernet headers, outer packets in fragments but by the kernel's device.
package route
