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
// ignored (a pod is ready once it listens), there is no scheduler beyond
// spreading each workload over the nodes, and the set of nodes is fixed while
// the lab is up. A Service that names no address family gets both.
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
// What it costs is a process a pod and about as long as it takes to start them;
// docs hold the measured figures.
package lab
