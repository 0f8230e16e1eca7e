// Package kube asks the Kubernetes API for the wishes of a cluster and follows
// their changes.
//
// It lists and watches Services, EndpointSlices, Nodes, and the Pods of one node, for
// names also the ConfigMaps and the Deployment of CoreDNS;
// package cluster makes Snapshots of them. It reads with protobuf, needs list and
// watch and no other verb (deploy/rbac.yaml), and writes nothing, neither to the
// API nor in the kernel. Beside that, a few single objects are read and altered for
// others: RemoveTaint, ReadLease, Say.
//
// What a person asks for from afar is apart: Agent.Exec runs millrace in an agent's
// container, and an Errand makes a pod, where somebody has agreed to that, and deletes it.
//
// # Who needs what
//
// Services and EndpointSlices are what is served; the endpoints come from slices
// alone. Nodes say where endpoints are, which ranges are pods', and in which zone
// this node is. Pods are asked for with spec.nodeName because only those of this
// node can ask for anything here (annotations); their addresses name a client in
// explain. Another node's pods are known as endpoints only. Who looks at packets between
// nodes (trace) asks for all.
//
// The server selects as it does for kube-proxy: no Services with the label
// service.kubernetes.io/service-proxy-name, no headless ones, and no slices with
// the label service.kubernetes.io/headless; all of these only with Settings.Names,
// since they are for DNS. Slices that name no Service are not asked for either. With
// Settings.Names the ConfigMaps coredns and coredns-custom and the Deployment coredns in
// kube-system are followed too; where they may not be read, or are not there, model.DNS says
// why it is not known how the DNS servers are configured.
//
// # Before Services work
//
// The address in a pod's environment is a Service, which nobody serves on a node
// that just came up. Settings.Servers are addresses of API servers themselves.
// One is used until it fails, then the next.
//
// # When it is told
//
// Nothing is delivered before Services and EndpointSlices were listed whole,
// because a Service without its endpoints would take them away; and nothing is
// Complete before these four kinds were. A change is delivered at once; after a
// Snapshot the next comes in a millisecond at the earliest, or in four times the
// processor time that the last took to make, so that a burst becomes few. Changes are taken over as
// they are read and wait in no queue: one who is slow is held up by TCP. Seen is
// when the event was read. Updates that say nothing new of what is read, such as
// a Node's heartbeat, make no Snapshot.
//
// # What goes wrong
//
//   - A watch ends (time, connection, half an event): it goes on from the last
//     resourceVersion or bookmark.
//   - 410: the kind is listed again, and what is not there is removed then.
//   - One kind is refused (401, 403, 500, no answer): it stays as it was, the
//     others go on, and a Problem says since when and why. If it was never listed,
//     the Snapshot is not complete.
//   - No kind can be read from any server: Run ends with the reason. The agent
//     calls it again, and it goes on where it was.
//   - The server is behind what we have seen, or lists no Services, no slices or
//     no Nodes at all: it was restored from a backup or has lost its store. A watch
//     from our version would stay silent, so the version is compared before every
//     watch that does not follow a list. What such a list says is taken over; what
//     it lacks stays in force for five minutes, in which controllers write again
//     what is missing, and a Problem says so. The kernel is then as the API says.
//   - A server that does not have even the Service default/kubernetes, which it
//     makes itself, has not come up: its list is an error.
//
// What cannot be told: a restored store whose resourceVersion has overtaken ours
// by the time we ask (etcd's --bump-revision makes that 410). A new agent knows
// nothing from before and believes the first complete list.
//
// Attempts are 0.1 s apart, then 0.2 s doubled up to 15 s, each half to one and a
// half times that, and not before the server's Retry-After. Pages and the start of
// a watch have 30 s.
//
// # Costs
//
// TestFiguresOfTenThousandServices, 10,000 Services with four endpoints and 2 kB
// of managedFields and annotations each, on two busy cores: 0.5 to 1.1 s to the
// first Snapshot with the server in the same process, of which 0.4 s are processor
// time of this package; 13 MB live, 1.3 kB for each; a change is delivered 0.18 ms
// (p50) and 1.4 ms (p99) after the server wrote it. Objects are turned into plain
// values a page of 500 at a time, and nothing else of them is kept; selectors are
// not either, because slices say whom they found.
package kube
