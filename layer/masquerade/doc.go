// Package masquerade gives what pods send out of the cluster an address of the node, and
// brings the answers back to the pods.
//
// At each device by which packets leave the node a program at tc looks at what comes from
// a pod of this node. What goes to a native range keeps its address: pods of the whole
// cluster, and what the configuration of ip-masq-agent names. All else gets the node's
// address at that device and a source port; another program turns the answers back before
// the host's stack sees them. So connection tracking, if anybody has it on, sees the pod
// and the world, and is not needed.
//
// Translated are TCP, UDP and pings, fragments of them, and ICMP errors about them, in
// IPv4 and IPv6; of IPv6 only for pods with unique local addresses (fc00::/7, RFC 4193),
// which nobody outside can answer. Other protocols are dropped and counted, for they would
// leave with an address that is nobody's outside. What somebody outside began with a pod's
// own address keeps it.
//
// A source port serves many destinations at once: what has to be different is the port
// and whom it is used towards. It is none that the kernel gives to sockets of the node, no
// node port, none at which a socket of the node would get the answer, and none that
// nf_conntrack has given towards the same destination. Where the node itself speaks from
// one later, the flow of the pod gives way. Where no port is found the packet is dropped,
// and counted by destination.
//
// What it writes in the kernel: eight maps, and two programs with a link each at each such
// device (before Linux 6.6 clsact filters), pinned in a folder of its own.
//
// What it costs: packets that leave take one look-up in a short table of ranges, those of
// pods two more. A flow takes about 350 bytes; its place of 40 bytes is there from the
// beginning. Flows are bounded, and what has ended makes room.
//
// Off means gone: Remove takes programs, maps and the folder away; flows that are open end
// with that.
//
// Not here: one port for a pod towards all destinations (RFC 4787, REQ-1), as peers behind
// two such nodes want it to find each other; SCTP; reserving ports against sockets that
// are opened later.
package masquerade
