// Package bench measures what a connection to a Service and a request on it cost,
// side by side and in one run: routed traffic without any Service, millrace, and
// the rule sets that kube-proxy writes for iptables and for nftables; with few
// Services and with many. Beside that, what it takes to load the Services, to
// change one endpoint of them and to hold them. It also holds the form in which
// every benchmark of millrace reports, and the page that draws it.
//
// # The bed
//
// Each variant has three network namespaces of its own, joined by two veth
// pairs: the client, the node that forwards, and the backends. What the variant
// needs is loaded in that node's namespace, or attached to the cgroup of that
// client, and nowhere else. Their addresses (10.244.0.0/16 for pods, 10.96.0.0/12
// for Services, 10.128.0.0/9 for endpoints that exist in rules only) are routed
// between these three namespaces alone and cannot meet those of the host.
//
// # One connection, one request
//
// A connection is socket, connect, 64 bytes there, 64 bytes back, end of stream, close; one at
// a time, by raw system calls from one client process, to one server process,
// both on the same core. On one core a connection is pure work, without the
// wake-up of another (virtual) core, which costs more than anything that is
// measured here and scatters by more than all differences.
//
// The server closes first, as an HTTP/1.0 server does, and the client reads to
// the end of the stream before it closes, so that it is never otherwise. Hence
// TIME_WAIT stays in the backends' namespace: the client's ports are free at
// once and finding one costs the same for the first connection as for the last.
// A port that comes round within the minute meets its old connection waiting;
// the backend accepts it because timestamps only grow (net.ipv4.tcp_timestamps
// = 2 takes the random offset per address pair away, which a Service's address
// would otherwise make inconsistent). All of this is equal for all variants,
// and so are: no saved metrics, reno (no pacing timer), IPv6 off.
//
// A request is 64 bytes there and 64 back on a connection that is open, with
// TCP_NODELAY on both sides, by the same two processes: what the packets of an
// established connection cost. Each turn opens one connection for it.
//
// # Rounds
//
// All beds stand at once, those with 10 Services beside those with 100,000. In
// every round each has its turn, in random order, for the same short time. A
// ratio is taken to the native figure of the same round, or to that of the same
// variant with the fewest Services, and what is reported is the median of these
// ratios with its distribution-free interval (see [MedianInterval]): a burst of
// other load on the machine then spoils some rounds, and does not move one
// figure against another.
//
// The interval covers what varies from round to round. It does not cover where
// the memory of a bed happens to lie, which stays the same for a whole run: two
// native beds (NativeAgain) were found up to 0.7 % apart in ten runs, with
// intervals of +-0.3 %. Read a difference below one percent as none.
//
// # Loading and changing
//
// A load is from nothing to all Services, in a namespace or a process of its own,
// the best of few. A change replaces one endpoint of the tested Service by a spare
// one and back, each time proved by connections that reach the new one and not
// the old: a change that did nothing ends the run. It runs before the rounds.
//
// The peers are loaded and changed by the programs and with the input that
// kube-proxy would use. What takes many minutes to load (variant.most) is left out
// unless Options.AllSizes asks for it.
//
// # Names
//
// DNS has one node and a pod for each variant, each with its resolv.conf; the servers and
// the layer under test are on that node. Its clients are processes of this program, and a
// small one in C (getaddrinfo.c) for the resolvers of C libraries. Servers end with the
// process that watches them, and that with the benchmark.
//
// # Between nodes
//
// Path has two nodes for each variant, joined by a veth that stands for the wire, with the
// client's pod on one and the server's on the other. Both processes stay on one core.
//
// # What it writes, what it costs
//
// Namespaces bound below /run/millrace/bench/PID, cgroups below
// <cgroup2>/millrace-bench-PID, both removed at the end with the
// folders above them that are then empty; a run that was killed is removed by the
// next one. Nothing in the host's own network namespace. The kernel may load
// modules of netfilter by itself when rules ask for them. One core is busy for as
// long as it measures, with about 15 MB of processes for each bed; beside that, for
// 100,000 Services of 2 endpoints, about 150 MB for each process that serves them
// and 100 MB here while they are loaded.
package bench
