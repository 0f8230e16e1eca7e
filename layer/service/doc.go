// Package service makes Kubernetes Services reachable: a connection to a
// ClusterIP goes to one of the Service's endpoints.
//
// The connect path: eBPF programs at connect(), sendmsg(), recvmsg() and
// getpeername() of a cgroup and all below it replace a Service's address by an
// endpoint's before the first packet exists, and show the Service's address to
// the program again. TCP and UDP, IPv4 and IPv6.
//
// What it writes in the kernel: the maps services, slots, backends, reasons,
// connected and sent; eight programs and their links to one cgroup; all pinned
// in one folder. Nothing in nftables, routes, sysctls or connection tracking.
//
// What it costs: a connect() to an address that is no Service takes one hash
// look-up, about 0.1 us; to one that is, six look-ups and a store in the socket,
// about 1.2 us (docs/decisions/0005-socket-state.md), whatever the number of
// Services; the packets that follow cost nothing. About 110 bytes of kernel
// memory a frontend and 230 an endpoint, when they exist.
//
// Off means gone: Remove takes links, programs, maps and the folder away.
// Connections that were made stay, for their packets carry endpoint addresses.
//
// Not here: packets that do not come from a socket of this cgroup (virtual
// machines, other nodes). NodePorts and external addresses are not served yet.
package service
