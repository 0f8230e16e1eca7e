package service

import (
	"bufio"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net/netip"
	"slices"
	"time"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/btf"
	"github.com/cilium/ebpf/link"
	"golang.org/x/sys/unix"

	"github.com/millrace/millrace/kernel/bpfmap"
	"github.com/millrace/millrace/kernel/need"
	"github.com/millrace/millrace/kernel/sockdiag"
	"github.com/millrace/millrace/layer"
	"github.com/millrace/millrace/model"
)

// A connected socket that was steered stays with its endpoint: its packets meet no
// program of ours. When the endpoint is gone, in no EndpointSlice of the Service
// any more, nothing may ever tell the client, so the agent closes the socket. While
// the endpoint is there, whatever its condition, the socket is the client's.

//go:generate go tool bpf2go -cc clang-14 -strip llvm-strip-14 -target bpfel -type steered stuck stuck.bpf.c -- -O2 -Wall -Werror -mcpu=v3

// DefaultDrain is how long TCP connections to an endpoint that is gone may go on:
// Kubernetes' terminationGracePeriodSeconds. An endpoint goes when its pod has ended,
// after that period, so the limit is for those whose pod lives on but is not the
// Service's any more, and for connections whose node has died.
const DefaultDrain = 30 * time.Second

const (
	// closeAtMost is how many sockets are closed before the agent sees to its other
	// work: 13 µs each.
	closeAtMost = 200
	// restOfLook keeps what looking costs below a twentieth of one processor,
	// however fast backends come and go.
	restOfLook = 20
	// restLeast spares the agent what else it does when it is woken.
	restLeast = 50 * time.Millisecond
	// lookAgain is when sockets are looked at once more after a change: a call of
	// connect() that chose its backend before it may have ended after it.
	lookAgain = time.Second
	// retryClose is when what could not be closed is tried again.
	retryClose = time.Minute
)

// use is what a connected socket uses: a Service's address, and the endpoint that
// it was steered to.
type use struct {
	frontend Frontend
	endpoint netip.AddrPort
}

// stuck looks for sockets whose endpoint is gone, and closes them. All it knows is
// found again in the kernel: the next process goes on where this one ended.
type stuck struct {
	drain time.Duration
	netns string
	// maps are the layer's at this moment.
	maps func() map[string]*ebpf.Map
	// endFlow marks a flow of the packet path.
	endFlow func(flow) (bool, error)
	closer  *sockdiag.Closer
	walk    *walk
	// cannot is why nothing is closed.
	cannot error
	// left is how many sockets could not be closed, and leftBecause why.
	left        int
	leftBecause error

	have, wanted *Picture // as they were last applied
	// due is when sockets are to be looked at; zero for never. wake is written to
	// then.
	due     time.Time
	wake    chan struct{}
	alarm   *time.Timer
	changed time.Time // when a backend last left the tables
	looked  time.Time // when sockets were last looked at
	rested  time.Time // before then nothing is looked at
	// condemned are sockets that were found and are yet to be closed.
	condemned []sockdiag.Socket
	// ending are flows of the packet path, likewise.
	ending []flow

	drains drains
	// noted is what the map draining holds, and unnoted why it could not be written.
	noted   drains
	unnoted error
	// stays are uses of endpoints that get no new connections, but are not gone.
	stays  map[use]bool
	closed map[string]uint64 // by the name of the counter
}

func newStuck(settings Settings, maps func() map[string]*ebpf.Map, endFlow func(flow) (bool, error)) *stuck {
	s := &stuck{drain: settings.Drain, netns: settings.Netns, maps: maps, endFlow: endFlow, wake: make(chan struct{}, 1),
		closed: map[string]uint64{closedTCP: 0, closedUDP: 0}}
	if s.drain == 0 {
		s.drain = DefaultDrain
	}
	s.closer, s.cannot = sockdiag.New(settings.Netns)
	s.drains, s.unnoted = readDrains(maps()[datapathMapDraining])
	s.noted = s.drains
	s.alarm = time.AfterFunc(time.Hour, func() {
		select {
		case s.wake <- struct{}{}:
		default: // it is awake
		}
	})
	s.alarm.Stop()
	return s
}

// What is counted, beside the reasons of the programs.
const (
	closedTCP = "closed_tcp"
	closedUDP = "closed_udp"
)

func (s *stuck) close() {
	if s == nil {
		return
	}
	s.alarm.Stop()
	s.walk.close()
	if s.closer != nil {
		s.closer.End()
	}
}

// drops says whether changes take a backend from a frontend, or all of them.
func drops(rows map[Frontend]*Row, changes layer.Changes) bool {
	return slices.ContainsFunc(changes, func(change layer.Change) bool {
		row := change.Subject.(*Row)
		before := rows[row.Frontend]
		if change.Op == layer.Remove || before == nil {
			return change.Op == layer.Remove
		}
		return slices.ContainsFunc(before.Backends, func(b netip.AddrPort) bool {
			_, stays := slices.BinarySearchFunc(row.Backends, b, netip.AddrPort.Compare)
			return !stays
		})
	})
}

// applied notes what is in force now. Sockets have to be looked at when a backend
// left the tables, when an endpoint that had left them before is gone now, and when
// the cluster is seen whole for the first time, or again.
func (s *stuck) applied(have, wanted *Picture, dropped bool) {
	if s == nil || s.closer == nil {
		return
	}
	again, same := s.wanted != nil && s.wanted.whole, s.wanted == wanted
	s.have, s.wanted = have, wanted
	if !wanted.whole {
		return
	}
	s.forgetReturned()
	if again && !dropped && (same || !s.someAreGone()) {
		return
	}
	s.changed = time.Now()
	s.lookAt(s.changed)
}

// forgetReturned forgets since when endpoints had been gone that are back: if they go
// again, their connections have the whole limit.
func (s *stuck) forgetReturned() {
	still := drains{}
	for u, since := range s.drains {
		if s.gone(u) {
			still[u] = since
		}
	}
	if len(still) < len(s.drains) {
		s.become(still)
	}
}

// become is what drains from now on, also for the process after this one.
func (s *stuck) become(now drains) {
	s.drains = now
	if s.unnoted = now.note(s.maps()[datapathMapDraining], s.noted); s.unnoted == nil {
		s.noted = now
	}
}

// someAreGone says whether one of the endpoints that were only not ready is gone.
func (s *stuck) someAreGone() bool {
	for u := range s.stays {
		if s.gone(u) {
			return true
		}
	}
	return false
}

// lookAt makes look do something at a time, if it would not do so earlier.
func (s *stuck) lookAt(when time.Time) {
	if when.Before(s.rested) {
		when = s.rested
	}
	if s.due.IsZero() || when.Before(s.due) {
		s.due = when
		s.alarm.Reset(time.Until(when))
	}
}

// look closes sockets whose endpoint is gone: those of UDP at once, those of TCP
// after the drain limit. It does nothing before it is due, and nothing for a
// cluster that was not seen whole.
func (s *stuck) look() {
	now := time.Now()
	if s == nil || s.closer == nil || s.due.IsZero() || now.Before(s.due) || s.wanted == nil {
		return
	}
	s.due = time.Time{}
	if !s.wanted.whole {
		s.condemned = nil
		return
	}
	if len(s.condemned) == 0 {
		if s.cannot = s.condemn(now); s.cannot != nil {
			s.lookAt(now.Add(retryClose))
			return
		}
	}
	part := s.condemned[:min(len(s.condemned), closeAtMost)]
	s.condemned = s.condemned[len(part):]
	s.closeAll(part)
	s.plan(now)
}

// plan says when to look again.
func (s *stuck) plan(now time.Time) {
	if len(s.condemned) > 0 {
		s.rested = now
		s.lookAt(now)
	}
	if s.left > 0 {
		s.lookAt(now.Add(retryClose))
	}
	if again := s.changed.Add(lookAgain); s.looked.Before(again) {
		s.lookAt(again)
	}
	for _, since := range s.drains {
		if until := since.Add(s.drain); s.looked.Before(until) {
			s.lookAt(until)
		}
	}
}

// condemn finds the sockets that are to be closed now.
func (s *stuck) condemn(now time.Time) error {
	if err := s.prepareWalk(); err != nil {
		return err
	}
	begun := time.Now()
	if err := s.judge(now); err != nil {
		return err
	}
	s.looked, s.left, s.leftBecause = now, 0, nil
	s.endAll()
	end := time.Now()
	s.rested = end.Add(max(restOfLook*end.Sub(begun), restLeast))
	return nil
}

// judge condemns sockets and flows whose endpoint is gone, and notes who drains and
// who stays.
func (s *stuck) judge(now time.Time) error {
	s.condemned = nil
	draining, stays, isGone := drains{}, map[use]bool{}, map[use]bool{}
	over := func(u use) bool {
		gone, known := isGone[u]
		if !known {
			gone = s.gone(u)
			isGone[u] = gone
		}
		if !gone {
			stays[u] = true
			return false
		}
		if u.frontend.Protocol == model.UDP {
			return true
		}
		if _, known := draining[u]; !known {
			draining[u] = now
			if since, before := s.drains[u]; before {
				draining[u] = since
			}
		}
		return now.Sub(draining[u]) >= s.drain
	}
	err := s.walk.each(func(u use, socket sockdiag.Socket) {
		if over(u) {
			s.condemned = append(s.condemned, socket)
		}
	})
	if err == nil {
		err = s.judgeFlows(over)
	}
	if err != nil {
		return err
	}
	s.stays = stays
	s.become(draining)
	return nil
}

func (s *stuck) closeAll(sockets []sockdiag.Socket) {
	for i, err := range s.closer.Close(sockets) {
		switch {
		case err == nil && sockets[i].Protocol == unix.IPPROTO_TCP:
			s.closed[closedTCP]++
		case err == nil:
			s.closed[closedUDP]++
		case !errors.Is(err, sockdiag.ErrEnded):
			s.left, s.leftBecause = s.left+1, err
		}
	}
}

// describe adds what was counted, and what does not work.
func (s *stuck) describe(d *layer.Description) {
	if s == nil {
		return
	}
	for name, n := range s.closed {
		d.Reasons[name] = n
	}
	if s.cannot != nil {
		d.Degraded = append(d.Degraded, fmt.Sprintf("connected sockets whose endpoint is gone stay as they are: %v", s.cannot))
	}
	if s.unnoted != nil {
		d.Degraded = append(d.Degraded, fmt.Sprintf("since when endpoints have been gone is not noted, so the drain limit begins again with the next agent: %v", s.unnoted))
	}
	if s.left > 0 {
		d.Degraded = append(d.Degraded, fmt.Sprintf("%d connected sockets whose endpoint is gone could not be closed; the last: %v", s.left, s.leftBecause))
	}
}

// gone says that the Service at a socket's address, if there still is one, has no
// such endpoint, in whatever condition.
func (s *stuck) gone(u use) bool {
	for _, at := range []Frontend{u.frontend, u.frontend.nodePort()} {
		row := s.row(at)
		if row != nil && s.wanted.hasEndpoint(row, u.endpoint) {
			return false
		}
	}
	return true
}

// row is what is wanted at a frontend. Making an index of that takes long, and what
// is in force is it, unless something of it failed.
func (s *stuck) row(frontend Frontend) *Row {
	if s.have.agrees == s.wanted {
		return s.have.index()[frontend]
	}
	return s.wanted.index()[frontend]
}

// hasEndpoint says whether the Service and the port of a row have an endpoint, in
// whatever condition.
func (p *Picture) hasEndpoint(row *Row, endpoint netip.AddrPort) bool {
	if row.Entry == AtHostPort {
		return slices.Contains(row.Backends, endpoint)
	}
	at, found := slices.BinarySearchFunc(p.plans, row.Service, func(p *plan, name model.Name) int {
		return p.service.Name.Compare(name)
	})
	if !found {
		return false
	}
	for _, port := range p.plans[at].service.Ports {
		if port.Name != row.Port || port.Protocol != row.Protocol {
			continue
		}
		for _, b := range port.Backends {
			if b.Address.Port() == endpoint.Port() && b.Address.Addr().Unmap() == endpoint.Addr() {
				return true
			}
		}
	}
	return false
}

// walk runs stuck.bpf.c.
type walk struct {
	backends  *ebpf.Map // that it looks into
	connected *ebpf.Map // that it walks over
	iter      *link.Iter
	// flow is where what is in a socket's flow, which has flowSize bytes.
	flow     fields
	flowSize int
}

func (w *walk) close() {
	if w != nil {
		w.iter.Close()
	}
}

// prepareWalk loads the program, unless it is loaded for the maps that there are.
func (s *stuck) prepareWalk() error {
	maps := s.maps()
	backends, connected := maps[datapathMapBackends], maps[datapathMapConnected]
	if s.walk != nil && s.walk.backends == backends && s.walk.connected == connected {
		return nil
	}
	s.walk.close()
	s.walk = nil
	made, err := newWalk(backends, connected)
	if err != nil {
		return walkError(err)
	}
	s.walk = made
	return nil
}

// walkError turns a failed load into what the user can do about it.
func walkError(err error) error {
	const act = "look for such sockets"
	switch {
	case errors.Is(err, unix.EPERM):
		return &need.Privilege{Act: act, Capabilities: []string{"CAP_BPF", "CAP_PERFMON", "CAP_NET_ADMIN"}}
	case errors.Is(err, ebpf.ErrNotSupported), errors.Is(err, btf.ErrNotFound):
		return &need.Feature{Act: act, Feature: fmt.Sprintf("description of its own types (%v)", err), Since: "Linux 5.15 with CONFIG_DEBUG_INFO_BTF"}
	}
	return fmt.Errorf("%s: load the program: %w", act, err)
}

func newWalk(backends, connected *ebpf.Map) (*walk, error) {
	tables, err := loadDatapath()
	if err != nil {
		return nil, err
	}
	spec, err := loadStuck()
	if err != nil {
		return nil, err
	}
	w := &walk{backends: backends, connected: connected, flow: layoutWanted(tables.Maps[datapathMapConnected]).value, flowSize: int(connected.ValueSize())}
	backend := layoutWanted(tables.Maps[datapathMapBackends]).value
	for name, value := range map[string]int{
		"flow_size":       w.flowSize,
		"flow_number":     w.flow.find("number").at,
		"flow_address":    w.flow.find("backend.word[0]").at,
		"flow_port":       w.flow.find("backend_port").at,
		"backend_address": backend.find("address.word[0]").at,
		"backend_port":    backend.find("port").at,
	} {
		if err := spec.Variables[name].Set(uint32(value)); err != nil {
			return nil, err
		}
	}
	table := spec.Maps[datapathMapBackends]
	table.Value, table.ValueSize, table.MaxEntries = nil, backends.ValueSize(), backends.MaxEntries()
	collection, err := ebpf.NewCollectionWithOptions(spec, ebpf.CollectionOptions{MapReplacements: map[string]*ebpf.Map{datapathMapBackends: backends}})
	if err != nil {
		return nil, err
	}
	defer collection.Close() // the link keeps the program
	w.iter, err = link.AttachIter(link.IterOptions{Program: collection.Programs[stuckProgFindSteered], Map: connected})
	return w, err
}

// walkRead is how much the kernel gives at a time (kernel/bpf/bpf_iter.c). When it
// goes on, it counts its way to where it was, so asking for less costs a lot.
const walkRead = 32 << 10

// each calls f with every connected socket whose flow leads to no backend in force.
func (w *walk) each(f func(use, sockdiag.Socket)) error {
	run, err := w.iter.Open()
	if err != nil {
		return fmt.Errorf("walk over sockets: %w", err)
	}
	defer run.Close()
	var told stuckSteered
	size := binary.Size(told)
	record := make([]byte, size+w.flowSize)
	records := bufio.NewReaderSize(run, walkRead)
	for {
		if _, err := io.ReadFull(records, record); err == io.EOF {
			return nil
		} else if err != nil {
			return fmt.Errorf("walk over sockets: %w", err)
		}
		if _, err := binary.Decode(record, binary.NativeEndian, &told); err != nil {
			return err
		}
		u, socket := w.meaning(&told, record[size:])
		f(u, socket)
	}
}

// meaning reads what is told of a socket.
func (w *walk) meaning(told *stuckSteered, flow []byte) (use, sockdiag.Socket) {
	at := func(address, port string) netip.AddrPort {
		bytes := flow[w.flow.find(address+".word[0]").at:]
		network := binary.BigEndian.Uint16(flow[w.flow.find(port).at:])
		return netip.AddrPortFrom(netip.AddrFrom16([16]byte(bytes[:16])).Unmap(), network)
	}
	endpoint := at("backend", "backend_port")
	protocol, cookie := uint8(told.Protocol), told.Cookie
	if told.Protocol == unix.IPPROTO_MPTCP {
		// What can be closed is the TCP socket that the kernel made for it.
		protocol, cookie = unix.IPPROTO_TCP, sockdiag.AnyCookie
	}
	socket := sockdiag.Socket{
		Protocol:  protocol,
		Local:     netip.AddrPortFrom(bpfmap.AddrOf(told.Local.Word), told.Port),
		Remote:    endpoint,
		Device:    told.Device,
		Cookie:    cookie,
		Namespace: told.Netns,
	}
	return use{Frontend{at("service", "service_port"), model.Protocol(protocol)}, endpoint}, socket
}
