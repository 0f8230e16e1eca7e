package service

import (
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/millrace/millrace/kernel/link"
	"github.com/millrace/millrace/kernel/netns"
	"github.com/millrace/millrace/layer/layertest"
	"github.com/millrace/millrace/model"
)

// town is a node where the layer is on, and namespaces of its pods. In each of
// them every address there is belongs to the namespace itself, so that a
// connection to whatever address arrives, and a server tells at which.
type town struct {
	*street
	// homes are the namespaces by the pods' addresses; that of the node is the
	// bed's, that of any other is anyone's.
	homes  map[netip.Addr]string
	anyone string
	// datagrams are those that arrived anywhere; sent counts those that were sent.
	datagrams chan datagram
	sent      int
}

func newTown(t *testing.T, path Path, snapshot *model.Snapshot) *town {
	t.Helper()
	bed := layertest.NewBed(t)
	w := &town{street: &street{Bed: bed, t: t}, homes: map[netip.Addr]string{}, datagrams: make(chan datagram, 16)}
	w.settle(bed.NetNS, nil, snapshot)
	w.anyone = w.home("anyone", nil, snapshot)
	for _, pod := range snapshot.Pods {
		if pod.Node == "n1" && !pod.HostNetwork {
			home := w.home(pod.Name.Name, pod.Addresses, snapshot)
			for _, address := range pod.Addresses {
				w.homes[address] = home
			}
		}
	}
	w.layer = New(Settings{Cgroup: bed.Cgroup, Netns: bed.NetNS, Pins: filepath.Join(bed.BPF, "service"), Node: "n1", Path: path})
	w.must(w.layer.Open())
	t.Cleanup(func() {
		w.layer.Close()
		_, err := New(w.layer.settings).Remove()
		w.must(err)
	})
	var err error
	w.have, err = w.layer.Read()
	w.must(err)
	w.become(snapshot)
	return w
}

func (w *town) must(err error) {
	w.t.Helper()
	if err != nil {
		w.t.Fatal(err)
	}
}

// home makes a pod's namespace, in which a process lives.
func (w *town) home(name string, addresses []netip.Addr, snapshot *model.Snapshot) string {
	w.t.Helper()
	path := filepath.Join(w.t.TempDir(), name)
	w.must(netns.Create(path))
	w.t.Cleanup(func() { w.must(netns.Remove(path)) })
	// it is known as a pod's of this node by a device pair
	node, err := link.Open(w.NetNS)
	w.must(err)
	defer node.Close()
	_, err = node.Veth(link.Veth{Name: "to-" + name, Peer: "eth0", PeerNamespace: path})
	w.must(err)
	resident := exec.Command(os.Args[0], "-test.run=^TestStay$")
	resident.Env = append(os.Environ(), stayVariable+"=1")
	leave, err := resident.StdinPipe()
	w.must(err)
	w.must(netns.Start(path, w.Cgroup, resident))
	w.t.Cleanup(func() {
		leave.Close()
		resident.Wait()
	})
	w.settle(path, addresses, snapshot)
	return path
}

// settle gives a namespace all addresses, and servers on every port.
func (w *town) settle(path string, addresses []netip.Addr, snapshot *model.Snapshot) {
	w.t.Helper()
	w.must(netns.Do(path, func() error {
		lo, err := netlink.LinkByName("lo")
		if err != nil {
			return err
		}
		if err := netlink.LinkSetUp(lo); err != nil {
			return err
		}
		for _, a := range addresses {
			address := &netlink.Addr{IPNet: &net.IPNet{IP: a.AsSlice(), Mask: net.CIDRMask(a.BitLen(), a.BitLen())}, Flags: unix.IFA_F_NODAD}
			if err := netlink.AddrAdd(lo, address); err != nil {
				return err
			}
		}
		for _, all := range []string{"0.0.0.0/0", "::/0"} {
			_, to, _ := net.ParseCIDR(all)
			route := &netlink.Route{Dst: to, LinkIndex: lo.Attrs().Index, Type: unix.RTN_LOCAL, Table: unix.RT_TABLE_LOCAL, Scope: netlink.SCOPE_HOST}
			if err := netlink.RouteAdd(route); err != nil {
				return fmt.Errorf("route %s: %w", all, err)
			}
		}
		for _, port := range portsOf(snapshot) {
			if err := w.listen(port); err != nil {
				return err
			}
		}
		return nil
	}))
}

// portsOf are the ports of Services and endpoints, and some that are nobody's.
func portsOf(snapshot *model.Snapshot) []uint16 {
	ports := []uint16{81, 443}
	for _, service := range snapshot.Services {
		for _, port := range service.Ports {
			ports = append(ports, port.Port)
			for _, b := range port.Backends {
				ports = append(ports, b.Address.Port())
			}
		}
	}
	slices.Sort(ports)
	return slices.Compact(ports)
}

// listen tells those who connect, and the channel, at which address they arrive.
func (w *town) listen(port uint16) error {
	at := fmt.Sprintf("[::]:%d", port)
	listener, err := net.Listen("tcp", at)
	if err != nil {
		return err
	}
	w.t.Cleanup(func() { listener.Close() })
	go func() {
		for {
			conn, err := listener.Accept()
			if err != nil {
				return
			}
			fmt.Fprintln(conn, conn.LocalAddr())
			conn.Close()
		}
	}()
	conn, err := net.ListenPacket("udp", at)
	if err != nil {
		return err
	}
	w.t.Cleanup(func() { conn.Close() })
	raw, err := conn.(*net.UDPConn).SyscallConn()
	if err == nil {
		raw.Control(func(fd uintptr) { err = unix.SetsockoptInt(int(fd), unix.SOL_IPV6, unix.IPV6_RECVPKTINFO, 1) })
	}
	go receive(conn.(*net.UDPConn), port, w.datagrams)
	return err
}

// datagram is what was in one, and where it arrived.
type datagram struct {
	text string
	at   netip.AddrPort
}

func receive(conn *net.UDPConn, port uint16, to chan<- datagram) {
	buffer, control := make([]byte, 64), make([]byte, 256)
	for {
		n, c, _, _, err := conn.ReadMsgUDP(buffer, control)
		if err != nil {
			return
		}
		messages, err := unix.ParseSocketControlMessage(control[:c])
		if err != nil || len(messages) == 0 || len(messages[0].Data) < 16 {
			continue
		}
		address := netip.AddrFrom16([16]byte(messages[0].Data[:16])).Unmap() // struct in6_pktinfo
		to <- datagram{string(buffer[:n]), netip.AddrPortFrom(address, port)}
	}
}

// homeOf is where a client with this address lives.
func (w *town) homeOf(e *Explanation) string {
	if e.Path == AtHost {
		return w.NetNS
	}
	if home := w.homes[e.Source.Addr()]; home != "" {
		return home
	}
	return w.anyone
}

// calls connects, and sends datagrams, until every endpoint got one.
func (w *town) calls(e *Explanation, verdict Verdict, backends []Choice) error {
	may := []netip.AddrPort{e.Destination}
	if verdict != NotAService {
		may = nil
	}
	for _, b := range backends {
		may = append(may, b.Address)
	}
	left := slices.Clone(may)
	for range 1000 {
		for _, call := range w.ways(e.Protocol) {
			at, err := call(w.homeOf(e), e.Destination)
			if verdict == Refuse {
				if !errors.Is(err, syscall.ECONNREFUSED) {
					return fmt.Errorf("a call arrived at %v, error %v", at, err)
				}
				continue
			}
			if err != nil {
				return err
			}
			if !slices.Contains(may, at) {
				return fmt.Errorf("a call arrived at %s", at)
			}
			left = slices.DeleteFunc(left, func(a netip.AddrPort) bool { return a == at })
		}
		if len(left) == 0 {
			return nil
		}
	}
	return fmt.Errorf("of 1000 calls none arrived at %v", left)
}

type call func(home string, to netip.AddrPort) (at netip.AddrPort, err error)

// ways are those in which a client may call.
func (w *town) ways(protocol model.Protocol) []call {
	if protocol == model.TCP {
		return []call{w.connect}
	}
	return []call{w.connectDatagrams, w.sendDatagram}
}

func (w *town) connect(home string, to netip.AddrPort) (at netip.AddrPort, err error) {
	err = netns.Do(home, func() error {
		conn, err := net.DialTimeout("tcp", to.String(), patience)
		if err != nil {
			return err
		}
		defer conn.Close()
		conn.SetDeadline(time.Now().Add(patience))
		line := make([]byte, 64)
		n, err := conn.Read(line)
		if err != nil {
			return err
		}
		at, err = netip.ParseAddrPort(strings.TrimSpace(string(line[:n])))
		return err
	})
	return unmapped(at), err
}

func (w *town) connectDatagrams(home string, to netip.AddrPort) (netip.AddrPort, error) {
	return w.datagram(home, func(text []byte) error {
		conn, err := net.Dial("udp", to.String())
		if err != nil {
			return err
		}
		defer conn.Close()
		_, err = conn.Write(text)
		return err
	})
}

func (w *town) sendDatagram(home string, to netip.AddrPort) (netip.AddrPort, error) {
	return w.datagram(home, func(text []byte) error {
		network := "udp6"
		if to.Addr().Is4() {
			network = "udp4"
		}
		conn, err := net.ListenPacket(network, ":0")
		if err != nil {
			return err
		}
		defer conn.Close()
		_, err = conn.WriteTo(text, net.UDPAddrFromAddrPort(to))
		return err
	})
}

// datagram sends one and waits until it has arrived somewhere.
func (w *town) datagram(home string, send func(text []byte) error) (netip.AddrPort, error) {
	w.sent++
	text := fmt.Sprint(w.sent)
	if err := netns.Do(home, func() error { return send([]byte(text)) }); err != nil {
		return netip.AddrPort{}, err
	}
	late := time.After(patience)
	for {
		select {
		case d := <-w.datagrams:
			if d.text == text {
				return d.at, nil
			}
		case <-late:
			return netip.AddrPort{}, errors.New("a datagram arrived nowhere")
		}
	}
}
