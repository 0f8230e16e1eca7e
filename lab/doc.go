// Package lab is a cluster in a box: it takes the manifests of a cluster and
// brings them to life on one machine, in network namespaces, for tests,
// benchmarks and demonstrations. Nodes are joined by one Ethernet segment, pods
// are joined to their node by veth and routes, and behind every port of a pod
// answers a small server that says which pod it is.
//
// A lab is one process, Run, which creates everything, keeps it alive and
// publishes the living cluster as Kubernetes objects, from which the agent of
// each node reads its wishes. Other processes speak with it through Dial, enter
// it through Exec and end it through Down.
//
// It differs from a cluster in what it leaves out: no images run, probes are
// ignored (a pod is ready once it listens), SCTP ports are not served, there is
// no scheduler beyond spreading each workload over the nodes, and the set of
// nodes is fixed while the lab is up. A Service that names no address family
// gets both (PreferDualStack). A pod that no workload owns comes back when it is
// killed, as long as the manifests ask for it.
//
// What it writes: files, bind mounts and one bpf file system below its folder
// (/run/millrace/lab/NAME), groups below millrace-lab/NAME in the cgroup2
// hierarchy, and, inside namespaces of its own making, links, addresses,
// routes, neighbours and settings. Nothing is created in the host's own network
// namespace. Down removes all of it, also after a crash.
//
// Its address ranges avoid those of the host and of other labs. Needs
// CAP_SYS_ADMIN and CAP_NET_ADMIN.
//
// What it costs is a process a pod. 300 pods on 3 nodes came up in 2 to 8 s,
// depending on what else two cores had to do, and went down in under one. With
// the millrace executable they took 0.9 GiB (PSS, 3 MiB each), 1.0 GiB with what
// the kernel keeps for their namespaces; a smaller executable takes half of it
// (TestLarge prints these figures). Ten pods replaced a second, each within
// 0.12 s, failed none of 200 calls a second for 30 s (TestReplaceUnderLoad).
package lab
