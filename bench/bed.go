package bench

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"net/netip"
	"path/filepath"

	"github.com/vishvananda/netlink"

	"github.com/millrace/millrace/kernel/cgroup"
	"github.com/millrace/millrace/kernel/netns"
)

// bed is the three namespaces of one variant, the cgroups of its two processes,
// and the processes.
type bed struct {
	name string
	// client, node and backend are the paths of the namespaces.
	client, node, backend string
	// group is the cgroup of the bed, clientGroup and serverGroup are in it.
	group, clientGroup, serverGroup string
	clientProcess, serverProcess    *process
	// detach takes away what the variant attached outside the namespaces.
	detach func() error
}

// makeBed makes the namespaces and cgroups below the run's folders and joins
// them. What was made is in the bed even if an error is returned: close it.
func makeBed(run *run, name string, backends int) (*bed, error) {
	b := &bed{
		name:    name,
		client:  filepath.Join(run.namespaces, name+"-client"),
		node:    filepath.Join(run.namespaces, name+"-node"),
		backend: filepath.Join(run.namespaces, name+"-backend"),
		group:   filepath.Join(run.group, name),
	}
	b.clientGroup, b.serverGroup = filepath.Join(b.group, "client"), filepath.Join(b.group, "server")
	for _, path := range []string{b.client, b.node, b.backend} {
		if err := netns.Create(path); err != nil {
			return b, err
		}
		if err := netns.Do(path, settings); err != nil {
			return b, fmt.Errorf("prepare namespace %s: %w", path, err)
		}
	}
	for _, path := range []string{b.clientGroup, b.serverGroup} {
		if err := cgroup.Create(path); err != nil {
			return b, err
		}
	}
	return b, b.join(backends)
}

// settings are those of each namespace. See the package documentation for why.
func settings() error {
	for _, s := range [][2]string{
		{"net.ipv4.tcp_timestamps", "2"},
		{"net.ipv4.tcp_no_metrics_save", "1"},
		{"net.ipv4.tcp_congestion_control", "reno"},
		{"net.ipv4.ip_local_port_range", "1024 65535"},
		{"net.ipv4.tcp_syn_retries", "1"}, // a connection that gets no answer fails after 3 s
		{"net.ipv4.conf.all.rp_filter", "0"},
		{"net.ipv4.conf.default.rp_filter", "0"},
		{"net.ipv4.ip_forward", "1"},
		{"net.ipv6.conf.default.disable_ipv6", "1"},
	} {
		err := netns.SetSysctl(s[0], s[1])
		if err != nil && !errors.Is(err, fs.ErrNotExist) { // no IPv6 in this kernel is fine
			return err
		}
	}
	return nil
}

// join makes the two veth pairs, addresses and routes.
func (b *bed) join(backends int) error {
	addresses := []netip.Prefix{}
	for _, backend := range liveBackends(backends + 1) { // and the spare one
		addresses = append(addresses, netip.PrefixFrom(backend.Addr(), backendBase.Bits()))
	}
	if err := b.connect(b.client, "c0", []netip.Prefix{clientAddress}, clientGateway); err != nil {
		return err
	}
	return b.connect(b.backend, "b0", addresses, backendGateway)
}

// connect joins the namespace at path to the node: eth0 with the addresses on
// its side, a link of the given name with the gateway's address on the node's.
func (b *bed) connect(path, nodeLink string, addresses []netip.Prefix, gateway netip.Prefix) error {
	err := b.makePair(path, nodeLink)
	if err == nil {
		err = netns.Do(b.node, func() error { return raise(nodeLink, gateway) })
	}
	if err == nil {
		err = netns.Do(path, func() error { return raise("eth0", addresses...) })
	}
	if err == nil {
		err = netns.Do(path, func() error {
			return netlink.RouteAdd(&netlink.Route{Gw: gateway.Addr().AsSlice()})
		})
	}
	if err != nil {
		return fmt.Errorf("join namespace %s to %s: %w", path, b.node, err)
	}
	return nil
}

// makePair makes the veth pair in the namespace at path, its other end born in
// the node's.
func (b *bed) makePair(path, nodeLink string) error {
	return withNamespace(b.node, func(fd int) error {
		return netns.Do(path, func() error {
			return netlink.LinkAdd(&netlink.Veth{
				LinkAttrs:     netlink.LinkAttrs{Name: "eth0", MTU: 1500},
				PeerName:      nodeLink,
				PeerNamespace: netlink.NsFd(fd),
			})
		})
	})
}

// raise gives a link its addresses and sets it and the loopback up.
func raise(name string, addresses ...netip.Prefix) error {
	for _, name := range []string{"lo", name} {
		link, err := netlink.LinkByName(name)
		if err != nil {
			return fmt.Errorf("find link %s: %w", name, err)
		}
		if err := netlink.LinkSetUp(link); err != nil {
			return fmt.Errorf("set link %s up: %w", name, err)
		}
		if name == "lo" {
			continue
		}
		for _, address := range addresses {
			ipnet := &net.IPNet{IP: address.Addr().AsSlice(), Mask: net.CIDRMask(address.Bits(), 32)}
			if err := netlink.AddrAdd(link, &netlink.Addr{IPNet: ipnet}); err != nil {
				return fmt.Errorf("add address %s to %s: %w", address, name, err)
			}
		}
	}
	return nil
}

// startWorkers starts the bed's server and client, pinned to one processor.
func (b *bed) startWorkers(ctx context.Context, worker []string, cpu int) (err error) {
	listen := fmt.Sprintf("-listen=0.0.0.0:%d", backendPort)
	b.serverProcess, err = startWorker(ctx, "server of "+b.name, worker, b.backend, b.serverGroup, cpuFlag(cpu), listen)
	if err == nil {
		b.clientProcess, err = startWorker(ctx, "client of "+b.name, worker, b.client, b.clientGroup, cpuFlag(cpu))
	}
	return err
}

// close takes everything away, as far as it can, and says what it could not.
func (b *bed) close() error {
	var errs []error
	for _, p := range []*process{b.clientProcess, b.serverProcess} {
		if p != nil {
			p.stop()
		}
	}
	if b.detach != nil {
		errs = append(errs, b.detach())
	}
	for _, path := range []string{b.client, b.node, b.backend} {
		errs = append(errs, netns.Remove(path))
	}
	errs = append(errs, cgroup.Remove(b.group))
	return errors.Join(errs...)
}
