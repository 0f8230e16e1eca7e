// Package service makes Kubernetes Services reachable: a connection to a
// ClusterIP goes to one of the Service's endpoints.
//
// The connect path: eBPF programs at connect(), sendmsg(), recvmsg() and
// getpeername() of a cgroup and all below it replace a Service's address by an
// endpoint's before the first packet exists, and show the Service's address to
// the program again. TCP and UDP, IPv4 and IPv6.
//
// The packet path: eBPF programs at the node's side of pods' veths translate each
// packet, for those whose sockets are not served. docs/service.md says who chooses.
// For clients on other machines, who come by node ports, external addresses and load
// balancers' addresses, it does the same at the devices by which packets leave the
// node, where some Service can be reached so; to endpoints on other nodes such a
// client comes from the node's address (masquerade.h).
//
// What it writes in the kernel: maps, programs and links, all pinned in one
// folder: the connect path's to one cgroup, the packet path's to pods' veths and the
// node's own devices (before Linux 6.6 clsact filters there). Where conntrack is bypassed, one nftables
// table of its own. Nothing in routes or sysctls.
//
// What it costs: a connect() to an address that is no Service takes one hash
// look-up, about 0.1 us; to one that is, six look-ups and a store in the socket,
// about 1.2 us (docs/decisions/0005-socket-state.md), whatever the number of
// Services; the packets that follow cost nothing. On the packet path a packet
// takes one look-up and the writing (0.2 us), a new flow about 1.4 us
// (docs/decisions/0008-packet-path.md). At the node's own devices a packet that is for
// no Service takes two look-ups each way. About 110 bytes of kernel memory a
// frontend, 230 an endpoint and 350 a flow, when they exist; 10 MB beside that
// where the packet path is in force.
//
// Off means gone: Remove takes links, programs, maps and the folder away.
// Connections that were made at the socket stay, for their packets carry endpoint
// addresses; those of the packet path end.
//
// Not here: SCTP, DSR, schedulers, XDP at the node's devices, GRE and InfiniBand
// devices.
package service
