package fault

import (
	"errors"
	"fmt"
	"math/rand/v2"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"strconv"
	"strings"
	"sync"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/millrace/millrace/kernel/link"
	"github.com/millrace/millrace/kernel/netns"
)

// spacesFolder is where `ip netns` looks, and everybody who is told a name.
const spacesFolder = "/run/netns"

// shape is how a scene's network is made.
type shape struct {
	// bridged makes the router a switch: client and server are neighbours.
	bridged bool
	// farther puts another router between the client and the router.
	farther bool
}

// space is one network namespace of a scene.
type space struct {
	name, path string
	net        *netlink.Handle
	// device leads to the router; of the router itself, to the client, and far to the server.
	device, far string
}

// do runs f on a thread inside.
func (s *space) do(f func() error) error { return netns.Do(s.path, f) }

// set writes settings, by turns a name and a value.
func (s *space) set(pairs ...string) error {
	return s.do(func() error {
		for i := 0; i < len(pairs); i += 2 {
			if err := netns.SetSysctl(pairs[i], pairs[i+1]); err != nil {
				return err
			}
		}
		return nil
	})
}

// run runs a program inside.
func (s *space) run(argv ...string) error { return s.feed("", argv...) }

// feed is run with an input.
func (s *space) feed(input string, argv ...string) error {
	cmd := exec.Command(argv[0], argv[1:]...)
	cmd.Stdin = strings.NewReader(input)
	var said []byte
	err := s.do(func() (err error) { said, err = cmd.CombinedOutput(); return err })
	if err != nil {
		return fmt.Errorf("run %s: %w: %s", strings.Join(argv, " "), err, strings.TrimSpace(string(said)))
	}
	return nil
}

// link is the device with this name.
func (s *space) link(name string) (netlink.Link, error) {
	l, err := s.net.LinkByName(name)
	if err != nil {
		return nil, fmt.Errorf("find %s in %s: %w", name, s.name, err)
	}
	return l, nil
}

// index is that of a device, or 0.
func (s *space) index(name string) int {
	l, err := s.net.LinkByName(name)
	if err != nil {
		return 0
	}
	return l.Attrs().Index
}

// mac is a device's.
func (s *space) mac(name string) net.HardwareAddr {
	l, err := s.net.LinkByName(name)
	if err != nil {
		return make(net.HardwareAddr, 6)
	}
	return l.Attrs().HardwareAddr
}

func (s *space) addr(device string, prefix netip.Prefix) error {
	l, err := s.link(device)
	if err != nil {
		return err
	}
	addr := &netlink.Addr{IPNet: ipNet(prefix)}
	if prefix.Addr().Is6() {
		addr.Flags = unix.IFA_F_NODAD
	}
	if err := s.net.AddrAdd(l, addr); err != nil {
		return fmt.Errorf("add address %s to %s in %s: %w", prefix, device, s.name, err)
	}
	return nil
}

// route adds a route; kind is RTN_UNICAST or one that leads nowhere, where via and
// device are empty.
func (s *space) route(to netip.Prefix, via netip.Addr, device string, kind int) error {
	r := &netlink.Route{Dst: ipNet(to.Masked()), Type: kind}
	if via.IsValid() {
		r.Gw = via.AsSlice()
	}
	if device != "" {
		r.LinkIndex = s.index(device)
		if !via.IsValid() {
			r.Scope = netlink.SCOPE_LINK
		}
	}
	if err := s.net.RouteReplace(r); err != nil {
		return fmt.Errorf("add route to %s in %s: %w", to, s.name, err)
	}
	return nil
}

// neigh says which hardware address a neighbour has.
func (s *space) neigh(device string, addr netip.Addr, mac net.HardwareAddr) error {
	family := unix.AF_INET
	if addr.Is6() {
		family = unix.AF_INET6
	}
	n := &netlink.Neigh{LinkIndex: s.index(device), Family: family, State: netlink.NUD_PERMANENT, IP: addr.AsSlice(), HardwareAddr: mac}
	if err := s.net.NeighSet(n); err != nil {
		return fmt.Errorf("add neighbour %s in %s: %w", addr, s.name, err)
	}
	return nil
}

// scene is a client, a router and a server, joined in this order.
type scene struct {
	random                 *rand.Rand
	client, router, server *space
	// hop is the other router, or nil.
	hop *space
	// near is the client's network, distant the server's: IPv4 and IPv6.
	near, distant [2]netip.Prefix
	// nearGate and distantGate are the next hops of client and server; hopGate is the
	// other router's address on the way to the router.
	nearGate, distantGate, hopGate [2]netip.Addr
	// hosts are the addresses that were given away.
	hosts   *hosts
	shape   shape
	closers []func() error
}

// hosts are addresses, of which two faults must not have the same.
type hosts struct {
	sync.Mutex
	taken map[netip.Addr]bool
}

// Words of names, as people and machines give them.
var (
	spaceWords  = []string{"web", "api", "cni", "pod", "blue", "green", "db", "edge", "node", "vm", "tenant", "qa", "site", "box"}
	deviceWords = []string{"eth", "ens", "net", "veth", "lxc", "cali", "p", "wan", "lan", "uplink"}
)

func newScene(random *rand.Rand, shape shape) (s *scene, err error) {
	s = &scene{random: random, shape: shape, hosts: &hosts{taken: map[netip.Addr]bool{}}}
	defer func() {
		if err != nil {
			err = errors.Join(fmt.Errorf("make a scene: %w", err), s.close())
		}
	}()
	s.drawNetworks()
	for _, to := range []**space{&s.client, &s.router, &s.server} {
		if *to, err = s.newSpace(); err != nil {
			return s, err
		}
	}
	s.client.device, s.server.device = s.deviceName(), s.deviceName()
	s.router.device, s.router.far = s.deviceName(), s.deviceName()
	if shape.farther {
		if err = s.addHop(); err != nil {
			return s, err
		}
	} else if err = s.join(s.router, s.router.device, s.client, s.client.device); err != nil {
		return s, err
	}
	if err = s.join(s.router, s.router.far, s.server, s.server.device); err != nil {
		return s, err
	}
	if shape.bridged {
		return s, s.wireBridge()
	}
	return s, s.wireRouter()
}

// close removes everything.
func (s *scene) close() error {
	var all error
	for i := len(s.closers) - 1; i >= 0; i-- {
		all = errors.Join(all, s.closers[i]())
	}
	s.closers = nil
	return all
}

func (s *scene) later(f func() error) { s.closers = append(s.closers, f) }

// drawNetworks chooses private ranges for both sides.
func (s *scene) drawNetworks() {
	four := func() netip.Prefix {
		b := [4]byte{10, byte(s.random.IntN(256)), byte(s.random.IntN(256)), 0}
		switch s.random.IntN(3) {
		case 1:
			b[0], b[1] = 172, byte(16+s.random.IntN(16))
		case 2:
			b[0], b[1] = 192, 168
		}
		return netip.PrefixFrom(netip.AddrFrom4(b), 24)
	}
	six := func() netip.Prefix {
		b := [16]byte{0xfd}
		for i := 1; i < 8; i++ {
			b[i] = byte(s.random.IntN(256))
		}
		return netip.PrefixFrom(netip.AddrFrom16(b), 64)
	}
	s.near = [2]netip.Prefix{four(), six()}
	for s.distant = s.near; s.distant[0] == s.near[0]; {
		s.distant = [2]netip.Prefix{four(), six()}
	}
	if s.shape.bridged {
		s.distant = s.near
	}
	for i := range s.near {
		s.nearGate[i], s.distantGate[i] = s.host(s.near[i]), s.host(s.distant[i])
	}
}

// host is an address of the range that the scene did not give away yet.
func (s *scene) host(in netip.Prefix) netip.Addr {
	s.hosts.Lock()
	defer s.hosts.Unlock()
	for {
		b := in.Addr().AsSlice()
		b[len(b)-1] = byte(2 + s.random.IntN(250))
		if in.Addr().Is6() && s.random.IntN(2) == 0 {
			b[len(b)-2], b[len(b)-5] = byte(s.random.IntN(256)), byte(s.random.IntN(256))
		}
		addr, _ := netip.AddrFromSlice(b)
		if !s.hosts.taken[addr] {
			s.hosts.taken[addr] = true
			return addr
		}
	}
}

func (s *scene) newSpace() (*space, error) {
	for range 100 {
		name := fmt.Sprintf("%s-%04x", spaceWords[s.random.IntN(len(spaceWords))], s.random.IntN(1<<16))
		path := spacesFolder + "/" + name
		if _, err := os.Lstat(path); err == nil {
			continue
		}
		err := netns.Create(path)
		if errors.Is(err, os.ErrExist) {
			continue
		}
		if err != nil {
			return nil, err
		}
		s.later(func() error { return errors.Join(netns.Remove(path), own.keep(name, false)) })
		if err := own.keep(name, true); err != nil {
			return nil, err
		}
		made := &space{name: name, path: path}
		err = made.do(func() (err error) { made.net, err = netlink.NewHandle(unix.NETLINK_ROUTE); return err })
		if err != nil {
			return nil, fmt.Errorf("open rtnetlink in %s: %w", name, err)
		}
		s.later(func() error { made.net.Close(); return nil })
		here, err := link.Open(path)
		if err != nil {
			return nil, err
		}
		defer here.Close()
		return made, errors.Join(here.UpLoopback(), made.settle())
	}
	return nil, errors.New("every name that was tried is taken")
}

func (s *scene) deviceName() string {
	word := deviceWords[s.random.IntN(len(deviceWords))]
	if len(word) > 3 {
		return word + fmt.Sprintf("%06x", s.random.IntN(1<<24))
	}
	return word + strconv.Itoa(s.random.IntN(1000))
}

// gate is who forwards for the client.
func (s *scene) gate() *space {
	if s.hop != nil {
		return s.hop
	}
	return s.router
}

// spaces are all that take part.
func (s *scene) spaces() []*space {
	all := []*space{s.client, s.router, s.server}
	if s.hop != nil {
		all = append(all, s.hop)
	}
	return all
}

// settle has link-local addresses in force at once. Until they have been looked for on the
// link (RFC 4862, 5.4), for up to two seconds, a router asks for no neighbour of what it
// forwards, and first connections by IPv6 would time out where nothing is wrong.
func (s *space) settle() error {
	return s.set("net.ipv6.conf.default.accept_dad", "0", "net.ipv6.conf.default.dad_transmits", "0")
}

// addHop makes the other router, joined on both sides.
func (s *scene) addHop() (err error) {
	if s.hop, err = s.newSpace(); err != nil {
		return err
	}
	s.hop.device, s.hop.far = s.deviceName(), s.deviceName()
	return errors.Join(
		s.join(s.hop, s.hop.device, s.client, s.client.device),
		s.join(s.hop, s.hop.far, s.router, s.router.device))
}

// join makes a pair of devices between two spaces.
func (s *scene) join(at *space, name string, to *space, peer string) error {
	fd, err := unix.Open(to.path, unix.O_RDONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		return fmt.Errorf("open %s: %w", to.path, err)
	}
	defer unix.Close(fd)
	attrs := netlink.NewLinkAttrs()
	attrs.Name = name
	pair := &netlink.Veth{LinkAttrs: attrs, PeerName: peer, PeerNamespace: netlink.NsFd(fd)}
	if err := at.net.LinkAdd(pair); err != nil {
		return fmt.Errorf("add %s and %s: %w", name, peer, err)
	}
	near, err := at.link(name)
	if err != nil {
		return err
	}
	far, err := to.link(peer)
	if err != nil {
		return err
	}
	return errors.Join(at.net.LinkSetUp(near), to.net.LinkSetUp(far))
}

// wireRouter gives everybody addresses, and routes to the other side.
func (s *scene) wireRouter() error {
	gate := s.gate()
	err := s.router.set("net.ipv4.ip_forward", "1", "net.ipv6.conf.all.forwarding", "1")
	if s.hop != nil {
		err = errors.Join(err, s.wireHop())
	}
	for i := range s.near {
		err = errors.Join(err,
			gate.addr(gate.device, netip.PrefixFrom(s.nearGate[i], s.near[i].Bits())),
			s.router.addr(s.router.far, netip.PrefixFrom(s.distantGate[i], s.distant[i].Bits())),
			s.client.addr(s.client.device, netip.PrefixFrom(s.host(s.near[i]), s.near[i].Bits())),
			s.server.addr(s.server.device, netip.PrefixFrom(s.host(s.distant[i]), s.distant[i].Bits())),
			s.client.route(s.distant[i], s.nearGate[i], s.client.device, unix.RTN_UNICAST),
			s.server.route(s.near[i], s.distantGate[i], s.server.device, unix.RTN_UNICAST))
	}
	return err
}

// wireHop gives the way between the two routers addresses: all else is beyond the router.
func (s *scene) wireHop() error {
	all := s.hop.set("net.ipv4.ip_forward", "1", "net.ipv6.conf.all.forwarding", "1")
	everything := [2]netip.Prefix{netip.MustParsePrefix("0.0.0.0/0"), netip.MustParsePrefix("::/0")}
	transit := [2]netip.Prefix{
		netip.PrefixFrom(netip.AddrFrom4([4]byte{169, 254, byte(s.random.IntN(256)), 0}), 28),
		netip.PrefixFrom(netip.AddrFrom16([16]byte{0xfd, 0xff, byte(s.random.IntN(256))}), 112),
	}
	for i, t := range transit {
		near := t.Addr().Next().Next()
		far := near.Next()
		s.hopGate[i] = near
		all = errors.Join(all,
			s.hop.addr(s.hop.far, netip.PrefixFrom(near, t.Bits())),
			s.router.addr(s.router.device, netip.PrefixFrom(far, t.Bits())),
			s.hop.route(everything[i], far, s.hop.far, unix.RTN_UNICAST),
			s.router.route(s.near[i], near, s.router.device, unix.RTN_UNICAST))
	}
	return all
}

// wireBridge makes the router a switch.
func (s *scene) wireBridge() error {
	attrs := netlink.NewLinkAttrs()
	attrs.Name = s.deviceName()
	bridge := &netlink.Bridge{LinkAttrs: attrs}
	if err := s.router.net.LinkAdd(bridge); err != nil {
		return fmt.Errorf("add bridge: %w", err)
	}
	all := s.router.net.LinkSetUp(bridge)
	for _, name := range []string{s.router.device, s.router.far} {
		port, err := s.router.link(name)
		if err == nil {
			err = s.router.net.LinkSetMaster(port, bridge)
		}
		all = errors.Join(all, err)
	}
	for i := range s.near {
		all = errors.Join(all,
			s.client.addr(s.client.device, netip.PrefixFrom(s.host(s.near[i]), s.near[i].Bits())),
			s.server.addr(s.server.device, netip.PrefixFrom(s.host(s.near[i]), s.near[i].Bits())))
	}
	return all
}

func ipNet(p netip.Prefix) *net.IPNet {
	return &net.IPNet{IP: p.Addr().AsSlice(), Mask: net.CIDRMask(p.Bits(), p.Addr().BitLen())}
}

// one is the range of one address.
func one(a netip.Addr) netip.Prefix { return netip.PrefixFrom(a, a.BitLen()) }
