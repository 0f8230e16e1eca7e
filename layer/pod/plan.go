package pod

import (
	"net/netip"
	"slices"

	"github.com/millrace/millrace/kernel/link"
	"github.com/millrace/millrace/layer"
	"github.com/millrace/millrace/model"
)

// plan is what the cluster says: which ranges this node has for its pods, in its order.
func plan(settings Settings, snapshot *model.Snapshot) *Picture {
	picture := &Picture{services: snapshot.Services}
	for _, node := range snapshot.Nodes {
		if node.Name != settings.Node {
			for _, r := range node.PodCIDRs {
				picture.others = append(picture.others, r.Masked())
			}
			continue
		}
		for _, r := range node.PodCIDRs {
			picture.ranges = append(picture.ranges, r.Masked())
		}
		picture.node = node.Addresses
	}
	// A runtime that finds them calls the node ready: not before pods can begin.
	if len(picture.ranges) > 0 {
		picture.install = settings.files()
	}
	return picture
}

// diff says what leads from have to want. What has happened to pods is known, however
// little is known of the cluster.
func diff(have, want *Picture, prune bool) layer.Changes {
	var changes layer.Changes
	add := func(op layer.Op, subject layer.Subject) {
		changes = append(changes, layer.Change{Op: op, Subject: subject})
	}
	for _, r := range want.ranges {
		if !slices.Contains(have.ranges, r) {
			add(layer.Add, podRange(r))
		}
	}
	for _, r := range have.ranges {
		if prune && !slices.Contains(want.ranges, r) {
			add(layer.Remove, podRange(r))
		}
	}
	for _, pod := range have.pods {
		switch {
		case pod.busy:
		case pod.state == unknown:
			add(layer.Add, pod)
		case pod.state == torn:
			add(layer.Alter, pod)
		case pod.state == gone:
			add(layer.Remove, pod)
		}
	}
	if prune { // else other nodes may not be known
		for _, c := range corrections(have, want.others) {
			add(layer.Alter, c)
		}
	}
	changes = append(changes, diffShortcuts(have)...)
	for _, file := range want.install {
		switch right, there := have.files[file]; {
		case !there:
			add(layer.Add, file)
		case !right:
			add(layer.Alter, file)
		}
	}
	return changes
}

// judge says what is to be done about each pod: those that are written down, and those
// that the kernel alone knows.
func judge(book []*Pod, found facts) (pods []*Pod) {
	known := map[string]bool{}
	for _, pod := range book {
		known[pod.Device] = true
		d, there := found.devices[pod.Device]
		pod.Index, pod.mtu, pod.state = d.index, d.mtu, whole
		switch {
		case !there:
			pod.state = gone
		case !found.leads(pod), unlimited(d.queue, pod.Bandwidth.IngressRate):
			pod.state = torn
		}
		pods = append(pods, pod)
	}
	for name, d := range found.devices {
		lease, ours := leaseOf(d.alias)
		if known[name] || !ours || deviceName(lease.Key) != name {
			continue
		}
		lease.Addresses = found.addressesOf(d.index)
		if len(lease.Addresses) > 0 { // else it was begun and never used
			pods = append(pods, &Pod{Lease: lease, Device: name, Index: d.index, mtu: d.mtu, state: unknown})
		}
	}
	return pods
}

// facts are what the kernel says of pods and of the node.
type facts struct {
	// devices are those whose names are like ours.
	devices map[string]device
	// routes are ours, by the address that they lead to.
	routes map[netip.Addr]route
	// own are the node's addresses.
	own []netip.Addr
	// mtu is that of the node's way out, in bytes, and table those of its routes.
	mtu   int
	table map[netip.Prefix]int
}

type device struct {
	index int
	alias string
	up    bool
	mtu   int // in bytes
	// queue is by what it sends to the pod.
	queue link.Qdisc
}

type route struct {
	device int
	source netip.Addr
}

// leads says whether the kernel knows the way to all addresses of a pod.
func (f facts) leads(pod *Pod) bool {
	for _, addr := range pod.Addresses {
		if f.routes[addr].device != pod.Index {
			return false
		}
	}
	return f.devices[pod.Device].up
}

// addressesOf are those to which routes lead by a device, IPv4 first.
func (f facts) addressesOf(device int) (all []netip.Addr) {
	for addr, r := range f.routes {
		if r.device == device {
			all = append(all, addr)
		}
	}
	slices.SortFunc(all, netip.Addr.Compare)
	return all
}

// elsewhere are the addresses to which somebody else's routes lead, such as to a pod of
// another plug-in.
func (f facts) elsewhere() (all []netip.Addr) {
	for to := range f.table {
		if to.IsSingleIP() {
			all = append(all, to.Addr())
		}
	}
	return all
}

// sources are the node's own addresses, as the cluster knows them, that packets of the
// node to its pods have: at most one of each family.
func sources(node, own []netip.Addr) (chosen []netip.Addr) {
	var families [2]bool
	for _, addr := range node {
		family := 0
		if addr = addr.Unmap(); addr.Is6() {
			family = 1
		}
		if !families[family] && slices.Contains(own, addr) {
			families[family] = true
			chosen = append(chosen, addr)
		}
	}
	return chosen
}
