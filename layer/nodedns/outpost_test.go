package nodedns

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/cilium/ebpf"
	"golang.org/x/net/dns/dnsmessage"

	"github.com/millrace/millrace/kernel/netns"
	"github.com/millrace/millrace/layer"
	"github.com/millrace/millrace/layer/layertest"
	"github.com/millrace/millrace/model"
)

var (
	dns4 = netip.MustParseAddrPort("10.96.0.10:53")
	dns6 = netip.MustParseAddrPort("[fd00:96::a]:53")
	// elsewhere is what the DNS Service answers, here what the agent does.
	elsewhere = [4]byte{192, 0, 2, 53}
	here      = [4]byte{192, 0, 2, 1}
)

func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// cluster has a DNS Service at these addresses.
func cluster(at ...netip.AddrPort) *model.Snapshot {
	s := &model.Service{
		Name:  model.Name{Namespace: "kube-system", Name: "kube-dns"},
		Ports: []model.ServicePort{{Name: "dns", Protocol: model.UDP, Port: 53}, {Name: "dns-tcp", Protocol: model.TCP, Port: 53}},
	}
	for _, a := range at {
		s.ClusterIPs = append(s.ClusterIPs, a.Addr())
	}
	other := &model.Service{Name: model.Name{Namespace: "shop", Name: "web"}, Ports: s.Ports, ClusterIPs: []netip.Addr{netip.MustParseAddr("10.96.0.20")}}
	return &model.Snapshot{Complete: true, Services: []*model.Service{s, other}}
}

// outpost is a node without pods, in a bed: whatever this process asks there the node asks.
type outpost struct {
	*layertest.Bed
	t        *testing.T
	settings Settings
	asked    atomic.Int64 // of the DNS Service
	// deny makes the DNS Service answer otherwise than it should.
	deny atomic.Pointer[func(query []byte) [][]byte]
}

func newOutpost(t *testing.T) *outpost {
	o := &outpost{Bed: layertest.NewBed(t), t: t}
	pins := filepath.Join(o.BPF, "millrace", "nodedns")
	must(t, os.Mkdir(filepath.Dir(pins), 0o700))
	o.settings = Settings{Cgroup: o.Cgroup, Netns: o.NetNS, Pins: pins, silence: time.Hour}
	return o
}

// serveElsewhere has the DNS Service at both addresses.
func (o *outpost) serveElsewhere() {
	o.t.Helper()
	for _, at := range []netip.AddrPort{dns4, dns6} {
		o.AddAddress(netip.PrefixFrom(at.Addr(), at.Addr().BitLen()).String())
		o.serveAt(at)
	}
}

func (o *outpost) serveAt(at netip.AddrPort) *net.UDPConn {
	o.t.Helper()
	var c *net.UDPConn
	must(o.t, o.Inside(func() (err error) {
		c, err = net.ListenUDP("udp", net.UDPAddrFromAddrPort(at))
		return err
	}))
	o.t.Cleanup(func() { c.Close() })
	go func() {
		query := make([]byte, 1500)
		for {
			n, from, err := c.ReadFromUDPAddrPort(query)
			if errors.Is(err, net.ErrClosed) {
				return
			}
			o.asked.Add(1)
			replies := [][]byte{answerTo(query[:n], elsewhere)}
			if deny := o.deny.Load(); deny != nil {
				replies = (*deny)(query[:n])
			}
			for _, reply := range replies {
				_, _ = c.WriteToUDPAddrPort(reply, from)
			}
		}
	}()
	return c
}

func answerTo(query []byte, with [4]byte) []byte {
	var m dnsmessage.Message
	if m.Unpack(query) != nil || len(m.Questions) != 1 {
		return nil
	}
	m.Response, m.RecursionAvailable, m.Additionals = true, true, nil
	m.Answers = []dnsmessage.Resource{{
		Header: dnsmessage.ResourceHeader{Name: m.Questions[0].Name, Class: dnsmessage.ClassINET, TTL: 1}, Body: &dnsmessage.AResource{A: with},
	}}
	answer, _ := m.Pack()
	return answer
}

func question(t *testing.T, id uint16, name string) []byte {
	t.Helper()
	m := dnsmessage.Message{
		Header:    dnsmessage.Header{ID: id, RecursionDesired: true},
		Questions: []dnsmessage.Question{{Name: dnsmessage.MustNewName(name), Type: dnsmessage.TypeA, Class: dnsmessage.ClassINET}},
	}
	query, err := m.Pack()
	must(t, err)
	return query
}

// open begins a layer as the agent does, with a DNS Service at both addresses.
func (o *outpost) open() *Layer {
	o.t.Helper()
	l := New(o.settings)
	must(o.t, l.Open())
	o.t.Cleanup(func() { l.Close() })
	o.apply(l, cluster(dns4, dns6))
	return l
}

func (o *outpost) apply(l *Layer, s *model.Snapshot) layer.Changes {
	o.t.Helper()
	have, err := l.Read()
	must(o.t, err)
	want := l.Plan(s)
	changes := l.Diff(have, want, true)
	_, _, err = l.Apply(have, want, changes)
	must(o.t, err)
	return changes
}

// knows is an agent that answers for all names but those that begin with "un".
func knows(_ context.Context, q Query) ([]byte, bool) {
	return answerTo(q.Message, here), !strings.HasPrefix(string(q.Message[13:]), "un")
}

// serve has an agent there until the function that it returns is called.
func (o *outpost) serve(l *Layer, answer func(context.Context, Query) ([]byte, bool)) (stop func()) {
	o.t.Helper()
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- l.Serve(ctx, answer) }()
	for begun := time.Now(); ; time.Sleep(time.Millisecond) {
		var is datapathPresence
		if l.host.(*datapath).maps[datapathMapPresences].Lookup(uint32(0), &is) == nil && is.Beat > 0 && is.Aside == 0 && o.listens(l) {
			break
		}
		if time.Since(begun) > 20*time.Second {
			o.t.Fatal("the agent does not begin")
		}
	}
	ended := false
	stop = func() {
		if cancel(); !ended {
			ended = true
			must(o.t, <-done)
		}
	}
	o.t.Cleanup(stop)
	return stop
}

func (o *outpost) listens(l *Layer) bool {
	for family := range datapathFamilyFAMILY_COUNT {
		var cookie uint64
		if l.host.(*datapath).maps[datapathMapListeners].Lookup(family, &cookie) != nil {
			return false
		}
	}
	return true
}

// client is a socket, and what it is connected to, if anything.
type client struct {
	*net.UDPConn
	to netip.AddrPort
	is bool // connected
}

// open opens a socket of the bed's namespace, or of another.
func (o *outpost) client(space, network string, to netip.AddrPort, connected bool) *client {
	o.t.Helper()
	c := &client{to: to, is: connected}
	must(o.t, netns.Do(space, func() (err error) {
		if connected {
			c.UDPConn, err = net.DialUDP(network, nil, net.UDPAddrFromAddrPort(to))
		} else {
			c.UDPConn, err = net.ListenUDP(network, nil)
		}
		return err
	}))
	o.t.Cleanup(func() { c.Close() })
	return c
}

// ask asks for a name, once, and returns the address in the answer and where that came from.
func (c *client) ask(t *testing.T, id uint16, name string) (answer [4]byte, from netip.AddrPort, err error) {
	t.Helper()
	query := question(t, id, name)
	if c.is {
		_, err = c.Write(query)
	} else {
		_, err = c.WriteToUDPAddrPort(query, c.to)
	}
	if err != nil {
		return answer, from, err
	}
	_ = c.SetReadDeadline(time.Now().Add(10 * time.Second))
	buffer := make([]byte, 1500)
	n, from, err := c.ReadFromUDPAddrPort(buffer)
	if err != nil {
		return answer, from, err
	}
	var m dnsmessage.Message
	if err := m.Unpack(buffer[:n]); err != nil {
		return answer, from, err
	}
	if m.ID != id || len(m.Answers) != 1 {
		return answer, from, fmt.Errorf("got %+v", m)
	}
	return m.Answers[0].Body.(*dnsmessage.AResource).A, netip.AddrPortFrom(from.Addr().Unmap(), from.Port()), nil
}

// expect asks, and compares who answered.
func (c *client) expect(t *testing.T, what, name string, want [4]byte) {
	t.Helper()
	got, from, err := c.ask(t, 7, name)
	if err != nil || got != want || from != c.to {
		t.Errorf("%s: %s is %v from %v, %v; not %v from %v", what, name, got, from, err, want, c.to)
	}
}

// await asks until it is answered so, and fails with what is wrong.
func (c *client) await(t *testing.T, wrong, name string, want [4]byte) {
	t.Helper()
	for begun := time.Now(); ; time.Sleep(time.Millisecond) {
		if got, _, err := c.ask(t, 7, name); err == nil && got == want {
			return
		}
		if time.Since(begun) > 20*time.Second {
			t.Fatal(wrong)
		}
	}
}

// events are what the layer has counted.
func (o *outpost) events(l *Layer) map[string]uint64 {
	o.t.Helper()
	d, err := l.Describe()
	must(o.t, err)
	return d.Reasons
}

// programsAt lists the programs of the bed's cgroup at one kind of call.
func (o *outpost) programsAt(call ebpf.AttachType) []ebpf.ProgramID {
	o.t.Helper()
	all, err := (&datapath{settings: o.settings}).at(call).Before(0)
	must(o.t, err)
	return all
}
