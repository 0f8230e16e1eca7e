package pod

import (
	"crypto/sha256"
	"encoding/base32"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"slices"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/millrace/millrace/kernel/link"
	"github.com/millrace/millrace/layer/pod/pool"
)

// routeProtocol is who made our routes (rtnetlink(7)); it is nobody's in iproute2's
// rt_protos (https://git.kernel.org/pub/scm/network/iproute2/iproute2.git/tree/etc/iproute2/rt_protos).
const routeProtocol = 109

// namePrefix begins the names of our devices.
const namePrefix = "mr"

// The gateways of pods: link-local addresses that nobody has. The node's hardware address
// is written down for them, so that a pod never asks for it.
var (
	gateway4 = netip.MustParseAddr("169.254.1.1")
	gateway6 = netip.MustParseAddr("fe80::1")
)

func gatewayOf(addr netip.Addr) netip.Addr {
	if addr.Is4() {
		return gateway4
	}
	return gateway6
}

func digest(key pool.Key, what string) [sha256.Size]byte {
	return sha256.Sum256([]byte(what + "\x00" + key.Container + "\x00" + key.Interface))
}

// deviceName is that of the node's end: always the same for one interface, so that what a
// process began that died is found.
func deviceName(key pool.Key) string {
	sum := digest(key, "name")
	text := strings.ToLower(base32.HexEncoding.EncodeToString(sum[:]))
	return namePrefix + text[:unix.IFNAMSIZ-1-len(namePrefix)]
}

// macOf is the hardware address of an end. One that is said from the beginning is not
// changed by systemd-udevd (systemd.link(5), MACAddressPolicy).
func macOf(key pool.Key, end string) net.HardwareAddr {
	sum := digest(key, end)
	sum[0] = sum[0]&^1 | 2 // one device's, and locally administered
	return slices.Clone(sum[:6])
}

func nodeMAC(key pool.Key) net.HardwareAddr { return macOf(key, "node") }
func podMAC(key pool.Key) net.HardwareAddr  { return macOf(key, "pod") }

// aliasLimit is IFALIASZ of linux/if.h, less the final zero.
const aliasLimit = 255

// aliasOf is what the node's end says of itself, in at most 255 bytes: the pod's name is
// what may be cut.
func aliasOf(lease pool.Lease) string {
	text := strings.Join([]string{"millrace", lease.Container, lease.Interface, lease.Network, lease.Pod}, " ")
	return text[:min(len(text), aliasLimit)]
}

// leaseOf reads what aliasOf wrote; the addresses are the kernel's to say.
func leaseOf(alias string) (pool.Lease, bool) {
	words := strings.Split(alias, " ")
	if len(words) != 5 || words[0] != "millrace" {
		return pool.Lease{}, false
	}
	return pool.Lease{Key: pool.Key{Container: words[1], Interface: words[2]}, Network: words[3], Pod: words[4]}, true
}

// node is the kernel's network of this node. It implements host.
type node struct{ netns string }

// look implements host.
func (n node) look() (facts, error) {
	f := facts{devices: map[string]device{}, routes: map[netip.Addr]route{}, table: map[netip.Prefix]int{}}
	net, err := link.Open(n.netns)
	if err != nil {
		return f, err
	}
	defer net.Close()
	devices, err := net.Devices()
	if err != nil {
		return f, err
	}
	queues, err := net.Qdiscs()
	if err != nil {
		return f, err
	}
	for _, d := range devices {
		f.own = append(f.own, d.Addresses...)
		if d.Kind == "veth" && strings.HasPrefix(d.Name, namePrefix) {
			f.devices[d.Name] = device{d.Index, d.Alias, d.Up, d.MTU, queues[d.Index]}
		}
	}
	f.mtu = uplinkMTU(devices)
	mtus := map[int]int{}
	for _, d := range devices {
		mtus[d.Index] = d.MTU
	}
	table, err := net.Table()
	for _, r := range table {
		if r.Protocol == routeProtocol {
			if r.To.IsSingleIP() {
				f.routes[r.To.Addr()] = route{r.Link, r.Source}
			}
			continue
		}
		mtu := mtus[r.Link]
		if r.MTU > 0 {
			mtu = min(mtu, r.MTU)
		}
		if is := f.table[r.To]; mtu > 0 && (is == 0 || mtu < is) {
			f.table[r.To] = mtu
		}
	}
	return f, err
}

// defaultMTU is Ethernet's, in bytes (RFC 894).
const defaultMTU = 1500

// uplinkMTU is the smallest of the devices by which default routes leave: a packet that a
// pod may send has to fit the way out.
func uplinkMTU(devices []link.Device) int {
	smallest := 0
	for _, d := range devices {
		if d.DefaultRoute && d.Up && d.MTU > 0 && (smallest == 0 || d.MTU < smallest) {
			smallest = d.MTU
		}
	}
	if smallest == 0 {
		return defaultMTU
	}
	return smallest
}

// build implements host. What an earlier try left is removed first, and what this one
// made if it cannot be completed.
func (n node) build(pod *Pod, space string, to lengths, sources []netip.Addr) (err error) {
	outer, err := link.Open(n.netns)
	if err != nil {
		return err
	}
	defer outer.Close()
	inner, err := link.Open(space)
	if err != nil {
		return err
	}
	defer inner.Close()
	if err := outer.Delete(pod.Device); err != nil {
		return err
	}
	pod.Index, err = outer.Veth(link.Veth{
		Name: pod.Device, MAC: nodeMAC(pod.Key), MTU: to.device, Alias: aliasOf(pod.Lease),
		Peer: pod.Interface, PeerMAC: podMAC(pod.Key), PeerNamespace: space,
	})
	if errors.Is(err, unix.EEXIST) {
		return fmt.Errorf("the pod has an interface %s already: %w", pod.Interface, err)
	}
	if err == nil {
		pod.mtu = to.device
		if err = furnish(inner, pod, to); err == nil {
			err = mend(outer, pod, sources)
		}
		if err == nil {
			err = ready(outer, inner, pod)
		}
	}
	if err != nil {
		return errors.Join(err, outer.Delete(pod.Device))
	}
	return nil
}

// ready waits until both ends send: an answer that is dropped comes again after a second.
func ready(outer, inner *link.Net, pod *Pod) error {
	index, err := inner.Index(pod.Interface)
	if err != nil {
		return err
	}
	return errors.Join(outer.Ready(pod.Index), inner.Ready(index))
}

// furnish gives the pod's end its addresses, neighbours and routes.
func furnish(inner *link.Net, pod *Pod, to lengths) error {
	index, err := inner.Index(pod.Interface)
	if err != nil {
		return err
	}
	if err := inner.UpLoopback(); err != nil {
		return err
	}
	for _, addr := range pod.Addresses {
		if err := inner.Addr(index, netip.PrefixFrom(addr, addr.BitLen())); err != nil {
			return err
		}
	}
	if err := limit(inner, index, fromPod(pod.Bandwidth, to.device)); err != nil {
		return err
	}
	if err := inner.Up(index); err != nil {
		return err
	}
	for _, addr := range pod.Addresses {
		gateway := gatewayOf(addr)
		if err := inner.Neigh(index, gateway, nodeMAC(pod.Key)); err != nil {
			return err
		}
		if err := inner.Route(link.Route{To: netip.PrefixFrom(gateway, gateway.BitLen()), Link: index}); err != nil {
			return err
		}
	}
	return setRoutes(inner, index, to)
}

// mend implements host.
func (n node) mend(pod *Pod, sources []netip.Addr) error {
	outer, err := link.Open(n.netns)
	if err != nil {
		return err
	}
	defer outer.Close()
	return mend(outer, pod, sources)
}

// mend sets the node's end up, limits what it sends, and says the way to the pod's
// addresses. Called again it changes nothing.
func mend(outer *link.Net, pod *Pod, sources []netip.Addr) error {
	if slices.ContainsFunc(pod.Addresses, netip.Addr.Is6) {
		if err := outer.NoLinkLocal(pod.Index); err != nil {
			return err
		}
	}
	if err := limitReceived(outer, pod); err != nil {
		return err
	}
	if err := outer.Up(pod.Index); err != nil {
		return err
	}
	for _, addr := range pod.Addresses {
		if err := outer.Neigh(pod.Index, addr, podMAC(pod.Key)); err != nil {
			return err
		}
		to := link.Route{To: netip.PrefixFrom(addr, addr.BitLen()), Link: pod.Index, Protocol: routeProtocol}
		for _, source := range sources {
			if source.Is4() == addr.Is4() {
				to.Source = source
			}
		}
		err := outer.SetRoute(to)
		if errors.Is(err, unix.EINVAL) && to.Source.IsValid() {
			to.Source = netip.Addr{} // it has gone from the node meanwhile
			err = outer.SetRoute(to)
		}
		if err != nil {
			return err
		}
	}
	return nil
}

// demolish implements host: with the device both ends go, and the routes.
func (n node) demolish(name string) error {
	outer, err := link.Open(n.netns)
	if err != nil {
		return err
	}
	defer outer.Close()
	return outer.Delete(name)
}

// check implements host.
func (n node) check(pod *Pod, space string) (missing []string, err error) {
	outer, err := link.Open(n.netns)
	if err != nil {
		return nil, err
	}
	defer outer.Close()
	inner, err := link.Open(space)
	if err != nil {
		return nil, err
	}
	defer inner.Close()
	if pod.Index, err = outer.Index(pod.Device); err != nil {
		return []string{"device " + pod.Device + " of the node"}, nil
	}
	routes, err := outer.Routes(routeProtocol)
	if err != nil {
		return nil, err
	}
	neighs, err := outer.Neighs(pod.Index)
	if err != nil {
		return nil, err
	}
	for _, addr := range pod.Addresses {
		leads := func(r link.Route) bool { return r.Link == pod.Index && r.To.IsSingleIP() && r.To.Addr() == addr }
		if !slices.ContainsFunc(routes, leads) {
			missing = append(missing, fmt.Sprintf("route to %s by %s", addr, pod.Device))
		}
		if neighs[addr].String() != podMAC(pod.Key).String() {
			missing = append(missing, fmt.Sprintf("neighbour %s at %s", addr, pod.Device))
		}
	}
	return checkInside(outer, inner, pod, missing)
}

func checkInside(outer, inner *link.Net, pod *Pod, missing []string) ([]string, error) {
	devices, err := inner.Devices()
	if err != nil {
		return nil, err
	}
	at := slices.IndexFunc(devices, func(d link.Device) bool { return d.Name == pod.Interface })
	if at < 0 || devices[at].MAC.String() != podMAC(pod.Key).String() {
		return append(missing, "interface "+pod.Interface+" of the pod, as it was made"), nil
	}
	d := devices[at]
	if !d.Up {
		missing = append(missing, "interface "+pod.Interface+" of the pod being up")
	}
	unlimited, err := unlimitedEnds(outer, inner, pod, d.Index)
	if err != nil {
		return nil, err
	}
	missing = append(missing, unlimited...)
	routes, err := inner.Table()
	if err != nil {
		return nil, err
	}
	for _, addr := range pod.Addresses {
		leads := func(r link.Route) bool { return r.Link == d.Index && r.To == netip.PrefixFrom(addr, 0).Masked() }
		if !slices.ContainsFunc(routes, leads) {
			missing = append(missing, fmt.Sprintf("a default route of the pod by %s from %s", pod.Interface, addr))
		}
		if !slices.Contains(d.Addresses, addr) {
			missing = append(missing, fmt.Sprintf("address %s at %s of the pod", addr, pod.Interface))
		}
	}
	return missing, nil
}
