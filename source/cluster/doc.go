// Package cluster keeps the Kubernetes objects that a source has seen and makes
// model.Snapshots of them. It is the half that every source shares: source/dir
// feeds it from files, a source that watches the API server feeds it from there.
//
// It checks each object, joins Services with their EndpointSlices, settles who
// may have an address that two objects claim, and says as model.Problems what it
// could not use. It is not for reading files or the network, and it writes
// nothing in the kernel.
//
// # What is in force
//
// An object with a fault (port 0, an unknown protocol, an address that is none)
// leaves its last faultless version in force. Where there was none, the rest of
// the object is in force without the faulty part. When two Services or two pods
// claim one address, the older one has it (creationTimestamp, then name) and the
// other is left out until the matter is settled; when it is one node port, the
// younger Service is kept without that node port; when the pod ranges of two
// Nodes overlap, the younger Node is kept without that range.
//
// Where no range of loadBalancerSourceRanges can be read, nobody knows who may use
// the load balancer's addresses, and they are left out. Services and slices with
// the label service.kubernetes.io/service-proxy-name are another proxy's; slices
// with service.kubernetes.io/headless are for headless Services alone. Slices that
// disagree about an endpoint's hints leave it without any.
//
// # Unread
//
// A new process has not seen the versions that an older one kept in force, so
// model.Snapshot.Unread tells it not to remove anything. The rule is: whatever
// would have left an earlier version in force, had there been one, is unread as
// long as there was none. One object counts once, by what became of it:
//
//   - Unread: it has a fault, and no faultless version of it was put since it
//     was last deleted. That is any fault, also one that still lets all of the
//     object be used (a lone port without a name) or that repeats what is there
//     (a port twice), because either may have been another port before.
//   - Not unread: it has a fault and an earlier faultless version stands in.
//   - Not unread: it has oddities alone (no ports, a selector that matches
//     nothing, a port of SCTP, a range with bits behind its mask, an unknown
//     field): it replaced what was there before.
//   - Not unread: it is understood and lost an address, a node port or a range to
//     an older object: it would have lost that with any past.
//   - Not unread: it is understood and not wanted: a pod that has ended, the
//     ReplicaSet of a Deployment, a slice of host names, a Service of another proxy.
//
// What a source could not make an object of, it counts itself in a Remark.
//
// Of ConfigMaps those of CoreDNS are read (package corefile), with the Deployment that mounts
// them. They have no faults: what they say that cannot be used is a reason to leave the names
// to CoreDNS.
//
// # Costs
//
// A Snapshot costs what changed since the last one, plus a copy of one pointer
// for each object of a kind that changed. BenchmarkSnapshotOneChange, one changed
// EndpointSlice of four endpoints, on two busy cores of an AMD EPYC: 0.05 to 0.09
// ms at 10,000 Services, 0.6 to 0.8 ms at 100,000, of which nearly all is that
// copy and its collection as garbage. Objects that did not change keep their
// pointers.
//
// # Memory
//
// A Service with an EndpointSlice of four endpoints takes 1.6 kB, of which 1.3
// kB are the Snapshot: 448 bytes of endpoints, 340 of a selector, 320 of the
// Service itself, and its names. What is kept beside the Snapshot is an Object
// of 80 bytes for each, 100 bytes for the slice, and 15 bytes for each way to
// find one (see index). The Service is kept as the Snapshot has it, its slices
// use its endpoints for their own, and names that many objects have (nodes, zones,
// namespaces, labels) are in memory once.
package cluster
