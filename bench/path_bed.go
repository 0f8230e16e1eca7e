package bench

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"path/filepath"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/millrace/millrace/kernel/cgroup"
	"github.com/millrace/millrace/kernel/netns"
)

// pathSession is one run of Path.
type pathSession struct {
	*session
	attach map[string]PathAttach
	second []string // the namespaces of second nodes
	// ways belong to the cells, in their order.
	ways []*way
}

// way is what a cell of paths has beside its bed.
type way struct {
	pathVariant
	// nodes are the paths of the nodes' namespaces, pods the addresses of client and server.
	nodes []string
	pods  [2]netip.Addr
}

// prepare makes a bed for each variant, all of which stay until the end.
func (p *pathSession) prepare(ctx context.Context) error {
	p.Services = []int{1} // one, as it were: the target
	for _, variant := range pathVariants {
		if err := ctx.Err(); err != nil {
			return err
		}
		p.progress("prepare %s", variant.name)
		if err := p.prepareWay(ctx, &way{pathVariant: variant}); err != nil {
			return fmt.Errorf("prepare %s: %w", variant.name, err)
		}
	}
	return nil
}

func (p *pathSession) prepareWay(ctx context.Context, w *way) error {
	b, err := p.makePathBed(w)
	if err != nil {
		return err
	}
	if err := p.lead(w, b); err != nil {
		return err
	}
	if err := b.startWorkers(ctx, p.WorkerCommand, p.cpu); err != nil {
		return err
	}
	server := netip.AddrPortFrom(w.pods[1], backendPort)
	c := &cell{variant: w.name, services: 1, bed: b, targets: []netip.AddrPort{server}, outcomes: map[string][]outcome{}}
	if w.service {
		c.targets[0] = pathService
	}
	p.cells, p.ways = append(p.cells, c), append(p.ways, w)
	return c.prove([]netip.AddrPort{server})
}

// pathService is where the Service is that leads to the server.
var pathService = netip.AddrPortFrom(nth(serviceRange.Addr(), 10), servicePort)

// makePathBed makes the node, or two joined by a wire, and the namespaces of two pods.
func (p *pathSession) makePathBed(w *way) (*bed, error) {
	b := &bed{
		name:    w.name,
		client:  filepath.Join(p.run.namespaces, w.name+"-client"),
		node:    filepath.Join(p.run.namespaces, w.name+"-node"),
		backend: filepath.Join(p.run.namespaces, w.name+"-backend"),
		group:   filepath.Join(p.run.group, w.name),
	}
	p.beds = append(p.beds, b)
	b.clientGroup, b.serverGroup = filepath.Join(b.group, "client"), filepath.Join(b.group, "server")
	w.nodes = []string{b.node}
	if !w.same {
		second := filepath.Join(p.run.namespaces, w.name+"-second")
		w.nodes, p.second = append(w.nodes, second), append(p.second, second)
	}
	for _, path := range append([]string{b.client, b.backend}, w.nodes...) {
		if err := netns.Create(path); err != nil {
			return b, err
		}
		err := netns.Do(path, func() error { return errors.Join(settings(), raise("lo")) })
		if err != nil {
			return b, fmt.Errorf("prepare namespace %s: %w", path, err)
		}
	}
	for _, path := range []string{b.clientGroup, b.serverGroup} {
		if err := cgroup.Create(path); err != nil {
			return b, err
		}
	}
	if w.same {
		return b, nil
	}
	return b, wire(w.nodes[0], w.nodes[1])
}

// uplink is the name of the wire's ends.
const uplink = "wire"

// wire joins two nodes.
func wire(first, second string) error {
	err := withNamespace(second, func(fd int) error {
		return netns.Do(first, func() error {
			return netlink.LinkAdd(&netlink.Veth{LinkAttrs: netlink.LinkAttrs{Name: uplink, MTU: 1500}, PeerName: uplink, PeerNamespace: netlink.NsFd(fd)})
		})
	})
	for i, node := range []string{first, second} {
		if err == nil {
			err = netns.Do(node, func() error { return raise(uplink, wireAddresses[i]) })
		}
	}
	if err != nil {
		return fmt.Errorf("join nodes %s and %s: %w", first, second, err)
	}
	return nil
}

// lead gives the pods their networks, and makes packets go the variant's way.
func (p *pathSession) lead(w *way, b *bed) error {
	w.pods = [2]netip.Addr{clientAddress.Addr(), backendBase.Addr()}
	switch {
	case w.ours:
		return p.leadOurs(w, b)
	case w.name == SameBridge:
		return b.bridge(netip.PrefixFrom(w.pods[0], podRange.Bits()), netip.PrefixFrom(w.pods[1], podRange.Bits()))
	}
	far := *b
	far.node = w.nodes[len(w.nodes)-1]
	err := b.connect(b.client, "c0", []netip.Prefix{clientAddress}, clientGateway)
	if err == nil {
		err = far.connect(b.backend, "b0", []netip.Prefix{backendBase}, backendGateway)
	}
	for i := range w.nodes {
		if err != nil || w.same {
			return err
		}
		to := []netip.Prefix{backendBase, clientAddress}[i].Masked()
		err = netns.Do(w.nodes[i], func() error {
			if w.name == KernelVXLAN {
				return kernelVXLAN(i, to)
			}
			return netlink.RouteAdd(&netlink.Route{Dst: network(to), Gw: wireAddresses[1-i].Addr().AsSlice()})
		})
	}
	return err
}

// leadOurs has millrace do that.
func (p *pathSession) leadOurs(w *way, b *bed) error {
	attach := p.attach[w.name]
	if attach == nil {
		return errors.New("nothing was given to attach under that name (bench.PathOptions.Attach)")
	}
	spec := PathSpec{Variant: w.name, Nodes: w.nodes, Pods: [2]string{b.client, b.backend}, Cgroup: b.clientGroup, Port: backendPort}
	for i := range w.nodes {
		spec.Addresses = append(spec.Addresses, wireAddresses[i].Addr())
		spec.Ranges = append(spec.Ranges, []netip.Prefix{clientAddress, backendBase}[i].Masked())
	}
	if w.service {
		spec.Service = pathService
	}
	var err error
	b.detach, err = attach(spec)
	for i, space := range spec.Pods {
		if err == nil {
			w.pods[i], err = addressIn(space)
		}
	}
	return err
}

// addressIn is the address of a pod.
func addressIn(space string) (found netip.Addr, err error) {
	err = netns.Do(space, func() error {
		eth0, err := netlink.LinkByName("eth0")
		if err != nil {
			return err
		}
		all, err := netlink.AddrList(eth0, unix.AF_INET)
		if err == nil && len(all) != 1 {
			err = fmt.Errorf("it has %d addresses", len(all))
		}
		if err == nil {
			found, _ = netip.AddrFromSlice(all[0].IP.To4())
		}
		return err
	})
	if err != nil {
		err = fmt.Errorf("find the address of the pod in %s: %w", space, err)
	}
	return found, err
}

// bridge joins client and backend to a Linux bridge.
func (b *bed) bridge(client, backend netip.Prefix) error {
	err := netns.Do(b.node, func() error {
		attrs := netlink.NewLinkAttrs()
		attrs.Name = "br0"
		return errors.Join(netlink.LinkAdd(&netlink.Bridge{LinkAttrs: attrs}), raise("br0"))
	})
	for _, end := range []struct {
		path, port string
		address    netip.Prefix
	}{{b.client, "c0", client}, {b.backend, "b0", backend}} {
		if err == nil {
			err = b.makePair(end.path, end.port)
		}
		if err == nil {
			err = netns.Do(end.path, func() error { return raise("eth0", end.address) })
		}
		if err == nil {
			err = netns.Do(b.node, func() error { return enslave(end.port, "br0") })
		}
	}
	return err
}

func enslave(port, bridge string) error {
	master, err := netlink.LinkByName(bridge)
	if err != nil {
		return err
	}
	part, err := netlink.LinkByName(port)
	if err != nil {
		return err
	}
	return errors.Join(netlink.LinkSetMaster(part, master), netlink.LinkSetUp(part))
}

func network(p netip.Prefix) *net.IPNet {
	return &net.IPNet{IP: p.Addr().AsSlice(), Mask: net.CIDRMask(p.Bits(), p.Addr().BitLen())}
}

// kernelVXLAN makes the device of a node, and all that it has to know of the other, as
// flannel does (https://github.com/flannel-io/flannel/blob/master/pkg/backend/vxlan/vxlan_network.go).
func kernelVXLAN(i int, to netip.Prefix) error {
	attrs := netlink.NewLinkAttrs()
	attrs.Name, attrs.MTU, attrs.HardwareAddr = "flannel.1", 1500-vxlanOverhead, net.HardwareAddr{2, 0, 0, 0, 0, byte(i)}
	other := net.HardwareAddr{2, 0, 0, 0, 0, byte(1 - i)}
	d := &netlink.Vxlan{LinkAttrs: attrs, VxlanId: 1, Port: 4789, SrcAddr: wireAddresses[i].Addr().AsSlice()}
	if err := netlink.LinkAdd(d); err != nil {
		return err
	}
	if err := netlink.LinkSetUp(d); err != nil {
		return err
	}
	return errors.Join(
		netlink.NeighAppend(&netlink.Neigh{LinkIndex: d.Index, Family: unix.AF_BRIDGE, Flags: netlink.NTF_SELF,
			State: netlink.NUD_PERMANENT | netlink.NUD_NOARP, IP: wireAddresses[1-i].Addr().AsSlice(), HardwareAddr: other}),
		netlink.NeighSet(&netlink.Neigh{LinkIndex: d.Index, Family: unix.AF_INET, State: netlink.NUD_PERMANENT, IP: to.Addr().AsSlice(), HardwareAddr: other}),
		netlink.RouteAdd(&netlink.Route{LinkIndex: d.Index, Dst: network(to), Gw: to.Addr().AsSlice(), Flags: int(netlink.FLAG_ONLINK)}))
}

// close takes the second nodes away.
func (p *pathSession) close() error {
	var errs []error
	for _, path := range p.second {
		errs = append(errs, netns.Remove(path))
	}
	return errors.Join(errs...)
}
