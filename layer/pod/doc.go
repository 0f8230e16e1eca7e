// Package pod gives a node's pods their network: it is what the CNI plugin asks.
//
// Container runtimes start the plugin (layer/pod/cni) when a pod begins and ends; the
// plugin asks the agent, and the agent's pod layer gives addresses out of the node's
// ranges (layer/pod/pool), makes a pair of devices, one end of it in the pod, and the
// routes to it. docs/pod.md has the whole way.
//
// Unlike other layers' its wishes come from two sides: ranges from the cluster, pods from
// the runtime. What a pod was given is written down before anything is made of it, and
// the kernel's devices say whose they are: a crash at any moment leaves what the next
// process completes, or takes back.
//
// Packets from pod to pod of the node take shortcuts, without the host's stack, where
// nobody's rules need to see them (shortcut.bpf.c).
//
// A pod whose annotations limit its bandwidth has a queue (tbf) at both ends of its veth.
//
// What it writes: for each pod a veth pair, the addresses and routes in the pod, queues
// where its bandwidth is limited, and on the node a route and a neighbour for each
// address, by a route protocol number of its own (109); three maps, and a program and a link for each pod, pinned in a folder of its
// own; a file and a socket. No sysctls, no rules.
//
// What it costs: an ADD takes some milliseconds, most of them the kernel's for the
// devices. About 300 bytes of memory and of the file a pod.
//
// Off means gone, but not under running pods: Remove takes the file and the socket away.
// A pod that runs keeps its devices and routes until it ends, when the kernel removes
// them with its namespace; an agent that is started again finds whose they are.
//
// The ports of the node that are to lead to a pod (hostPort) are written down with its
// addresses. Serving them is the service layer's: this one tells which there are.
//
// Where another plug-in has been, its pods' addresses are not given as long as they run.
//
// Not here: routes to other nodes (layer/route), masquerade (layer/masquerade),
// network policies.
package pod
