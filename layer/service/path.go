package service

import (
	"errors"
	"fmt"
	"net/netip"
	"slices"

	"github.com/cilium/ebpf"

	"github.com/millrace/millrace/kernel/link"
	"github.com/millrace/millrace/kernel/netns"
	"github.com/millrace/millrace/layer"
	"github.com/millrace/millrace/model"
)

// Path is where a Service address becomes a backend's.
type Path string

// The two paths. Each is complete by itself; packets that the socket path leaves
// alone are served by the packet path, if it is in force.
const (
	// PathSocket is at connect() and sendmsg(): packets cost nothing.
	PathSocket Path = "socket"
	// PathPacket is at the pod's veth, for each packet: for those that must find
	// the Service's address in their sockets, or whose sockets nobody sees.
	PathPacket Path = "packet"
)

// PathAnnotation asks for a path, on a Service or on a pod.
const PathAnnotation = "millrace.io/path"

// ParsePath reads a path; the empty text is PathSocket.
func ParsePath(text string) (Path, error) {
	switch path := Path(text); path {
	case "":
		return PathSocket, nil
	case PathSocket, PathPacket:
		return path, nil
	}
	return "", fmt.Errorf("unknown path %q: use %s or %s", text, PathSocket, PathPacket)
}

// number is the enum service_path of the path.
func (p Path) number() datapathServicePath {
	switch p {
	case PathPacket:
		return datapathServicePathPATH_PACKET
	case PathSocket:
		return datapathServicePathPATH_SOCKET
	}
	return datapathServicePathPATH_DEFAULT
}

func pathOf(number uint8) Path {
	switch datapathServicePath(number) {
	case datapathServicePathPATH_PACKET:
		return PathPacket
	case datapathServicePathPATH_SOCKET:
		return PathSocket
	}
	return ""
}

// askedPath is the path that annotations ask for; empty where they ask for none.
// A word that is none is as no annotation: the source reports it.
func askedPath(annotations map[string]string) Path {
	switch path := Path(annotations[PathAnnotation]); path {
	case PathSocket, PathPacket:
		return path
	}
	return ""
}

// wish is a pod of this node that asks for a path: the Subject of a change of the
// map paths.
type wish struct {
	pod  model.Name
	path Path
	// addresses are the pod's, by which its namespace is found.
	addresses []netip.Addr
	// cookie is its namespace's; known once it is in force.
	cookie uint64
}

// Object implements layer.Subject.
func (a *wish) Object() string {
	if a.pod.Name == "" {
		return fmt.Sprintf("path of namespace %d", a.cookie)
	}
	return "path of pod " + a.pod.String()
}

// Detail implements layer.Subject.
func (a *wish) Detail() string { return string(a.path) }

// veth is a network device of a pod, seen from the node: the Subject of attaching
// the packet path.
type veth struct {
	link.Device
	attached bool // as a pod's
	// asWire is what the programs know of it as one by which packets leave the node.
	asWire *wire
	// busy says that the packet path has flows, whose sockets know the Service only:
	// it must stay until they have ended, though nobody asks for it any more.
	busy bool
}

// Object implements layer.Subject.
func (v veth) Object() string { return "packet path at " + v.Name }

// Detail implements layer.Subject.
func (v veth) Detail() string { return "" }

// isPods says that a device is a pod's: a veth whose other end is in another
// namespace, and not the node's own way out, which may be a veth as well (kind,
// a lab).
func (v veth) isPods(node []netip.Addr) bool {
	if v.Kind != "veth" || !v.PeerElsewhere || v.DefaultRoute {
		return false
	}
	return !slices.ContainsFunc(v.Addresses, func(a netip.Addr) bool { return slices.Contains(node, a.Unmap()) })
}

// paths is what a plan says of the packet path.
type paths struct {
	// packets says that somebody may need it.
	packets bool
	asks    []*wish
	// wire says that packets from other machines are served, nodePorts that some
	// Service has one.
	wire, nodePorts bool
	// clients says that some Service asks for its clients' addresses.
	clients  bool
	settings Settings
	// node are the addresses of the node itself.
	node []netip.Addr
	// untracked is what it says of connection tracking.
	untracked untracked
}

func pathsOf(settings Settings, snapshot *model.Snapshot, services demands) paths {
	p := paths{
		packets: settings.path() == PathPacket || services.packets, untracked: untrackedOf(settings, snapshot),
		wire: settings.Wire && services.entrance, nodePorts: services.nodePorts, clients: services.clients, settings: settings,
	}
	for _, pod := range snapshot.Pods {
		path := askedPath(pod.Annotations)
		if path == "" || pod.Node != settings.Node || pod.HostNetwork || len(pod.Addresses) == 0 {
			continue
		}
		p.packets = p.packets || path == PathPacket
		p.asks = append(p.asks, &wish{pod: pod.Name, path: path, addresses: pod.Addresses})
	}
	for _, node := range snapshot.Nodes {
		if node.Name == settings.Node {
			p.node = node.Addresses
		}
	}
	slices.SortFunc(p.asks, func(a, b *wish) int { return a.pod.Compare(b.pod) })
	return p
}

// diffPaths says which devices, namespaces and ranges have to change: what comes first and
// what goes last.
func diffPaths(have *Picture, want paths, prune bool) (first, last layer.Changes) {
	first, last = diffBypass(have.tracking, want.untracked, prune)
	add := func(begin, end layer.Changes) { first, last = append(first, begin...), append(last, end...) }
	add(diffNodeAddresses(have.nodeAddresses, want, have.veths, prune))
	add(diffWires(have, want, prune))
	add(diffClients(have, want, prune))
	for _, p := range have.veths {
		needed := want.packets && p.isPods(want.node)
		if needed && !p.attached {
			first = append(first, layer.Change{Op: layer.Add, Subject: p})
		}
		if !needed && p.attached && prune && !(p.busy && p.isPods(want.node)) {
			last = append(last, layer.Change{Op: layer.Remove, Subject: p})
		}
	}
	left := slices.Clone(have.asks)
	for _, a := range want.asks {
		i := slices.IndexFunc(left, a.isAbout)
		switch {
		case i < 0:
			first = append(first, layer.Change{Op: layer.Add, Subject: a})
			continue
		case left[i].path != a.path:
			first = append(first, layer.Change{Op: layer.Alter, Subject: a})
		}
		left = slices.Delete(left, i, i+1)
	}
	for _, a := range left {
		if prune {
			last = append(last, layer.Change{Op: layer.Remove, Subject: a})
		}
	}
	return first, last
}

// isAbout says that two asks are about one namespace: they share an address.
func (a *wish) isAbout(other *wish) bool {
	return slices.ContainsFunc(a.addresses, func(address netip.Addr) bool { return slices.Contains(other.addresses, address) })
}

// devices lists the network devices of the node.
func (d *datapath) devices() ([]link.Device, error) {
	n, err := link.Open(d.settings.Netns)
	if err != nil {
		return nil, err
	}
	defer n.Close()
	return n.Devices()
}

// findVeths lists the devices with what is attached to them, and forgets those
// that are gone.
func (d *datapath) findVeths() ([]veth, error) {
	devices, err := d.devices()
	if err != nil {
		return nil, err
	}
	flows, err := d.flowCount()
	if err != nil {
		return nil, err
	}
	there := make(map[int]bool, len(devices))
	veths := make([]veth, len(devices))
	for i, device := range devices {
		there[device.Index] = true
		if d.isAnother(device.Index) {
			_ = d.detachPort(device.Index)
		}
		p, attached := d.ports[device.Index]
		if attached {
			p.name = device.Name
			d.ports[device.Index] = p
		}
		if d.isPod(device.Index) {
			if err := d.tellSpace(device); err != nil {
				return nil, err
			}
		}
		veths[i] = veth{device, attached && p.side == ofPod, d.readWire(device), flows > 0}
	}
	for device := range d.ports {
		if !there[device] {
			d.dropDeadPort(device)
		}
	}
	return veths, errors.Join(
		forgetDevices[datapathAddresses](d.maps[datapathMapWires], func(device int) bool { return d.ports[device].side != ofPod }),
		forgetDevices[uint32](d.maps[datapathMapSpaces], d.isPod))
}

// attachPod puts the packet path in force at a pod's device.
func (d *datapath) attachPod(v veth) error {
	if err := d.tellSpace(v.Device); err != nil {
		return err
	}
	if d.settings.Claim != nil {
		if err := d.settings.Claim(v.Index); err != nil {
			return err
		}
	}
	return d.attachPort(v.Index, packetPort{v.Name, ofPod})
}

// isPod says that the packet path is at a device, as a pod's.
func (d *datapath) isPod(device int) bool {
	port, there := d.ports[device]
	return there && port.side == ofPod
}

// tellSpace says in which network namespace a pod's device has its other end, unless
// the programs know.
func (d *datapath) tellSpace(device link.Device) error {
	var known uint32
	if d.maps[datapathMapSpaces].Lookup(uint32(device.Index), &known) == nil && int(known) == device.PeerNamespace {
		return nil
	}
	if err := d.maps[datapathMapSpaces].Put(uint32(device.Index), uint32(device.PeerNamespace)); err != nil {
		return fmt.Errorf("write %s: %w", datapathMapSpaces, err)
	}
	return nil
}

// isAnother says that a device has the index of one that went, and none of what was
// attached to that: one that is moved into the node's namespace keeps its index.
func (d *datapath) isAnother(device int) bool {
	for _, h := range portHooks(device, d.ports[device].side) {
		if have := d.attached[h.name]; have != nil && !have.Alive() {
			return true
		}
	}
	return false
}

// readAsks reads which namespaces ask for a path, and whose they are.
func (d *datapath) readAsks() ([]*wish, error) {
	var asks []*wish
	var cookie uint64
	var path uint8
	entries := d.maps[datapathMapPaths].Iterate()
	for entries.Next(&cookie, &path) {
		asks = append(asks, &wish{path: pathOf(path), cookie: cookie})
	}
	if err := entries.Err(); err != nil || len(asks) == 0 {
		return asks, err
	}
	spaces, refused := netns.Spaces(d.settings.Netns)
	for _, a := range asks {
		for _, space := range spaces {
			if space.Cookie == a.cookie {
				a.addresses = space.Addresses
			}
		}
	}
	if refused != nil {
		// Whose they are that were not found, nobody knows: they stay.
		asks = slices.DeleteFunc(asks, func(a *wish) bool { return len(a.addresses) == 0 })
	}
	return asks, nil
}

// carryOut makes one change of devices or wishes.
func (d *datapath) carryOut(change layer.Change) error {
	switch subject := change.Subject.(type) {
	case veth:
		if change.Op == layer.Remove {
			return d.detachPortAs(subject.Index, false)
		}
		return d.attachPod(subject)
	case wire:
		if change.Op == layer.Remove {
			return d.detachWire(subject.Index)
		}
		return d.attachWire(subject)
	case nodeAddress:
		return tellAddress(d.maps, change)
	case knownClient:
		return d.know(change)
	case *wish:
		if change.Op == layer.Remove {
			return gone(d.maps[datapathMapPaths].Delete(subject.cookie))
		}
		return d.answer(subject)
	case bypass:
		if change.Op == layer.Remove {
			subject = nil
		}
		return d.setUntracked(subject)
	}
	return fmt.Errorf("%T is nothing of this layer", change.Subject)
}

// gone is success where there was nothing to delete.
func gone(err error) error {
	if errors.Is(err, ebpf.ErrKeyNotExist) {
		return nil
	}
	return err
}

var errNoSpace = errors.New("its network namespace was not found: is it a pod of this node, and does it run?")

// answer writes what a pod asks for.
func (d *datapath) answer(a *wish) error {
	spaces, err := netns.Spaces(d.settings.Netns)
	for _, space := range spaces {
		if slices.ContainsFunc(a.addresses, func(address netip.Addr) bool { return slices.Contains(space.Addresses, address.Unmap()) }) {
			a.cookie = space.Cookie
			return d.maps[datapathMapPaths].Put(space.Cookie, uint8(a.path.number()))
		}
	}
	return errors.Join(errNoSpace, err)
}

// note keeps the picture in step with a change that was carried out.
func (p *Picture) note(change layer.Change) {
	switch subject := change.Subject.(type) {
	case veth:
		for i := range p.veths {
			if p.veths[i].Index == subject.Index {
				p.veths[i].attached = change.Op != layer.Remove
			}
		}
	case wire:
		for i := range p.veths {
			if p.veths[i].Index == subject.Index {
				p.veths[i].asWire = &subject
				if change.Op == layer.Remove {
					p.veths[i].asWire = nil
				}
			}
		}
	case knownClient:
		p.clients = slices.DeleteFunc(p.clients, func(c knownClient) bool { return c.cookie == subject.cookie })
		if change.Op != layer.Remove {
			p.clients = append(p.clients, subject)
		}
	case nodeAddress:
		p.nodeAddresses = slices.DeleteFunc(p.nodeAddresses, func(a netip.Addr) bool { return a == subject.Addr })
		if change.Op != layer.Remove {
			p.nodeAddresses = append(p.nodeAddresses, subject.Addr)
		}
	case *wish:
		p.asks = slices.DeleteFunc(p.asks, func(a *wish) bool { return a == subject || a.isAbout(subject) })
		if change.Op != layer.Remove {
			p.asks = append(p.asks, subject)
		}
	case bypass:
		p.tracking.inForce, p.tracking.torn = subject, false
		if change.Op == layer.Remove {
			p.tracking.inForce = nil
		}
	}
}
