package service

import (
	"bytes"
	"errors"
	"fmt"
	"io/fs"
	"path/filepath"
	"time"
	"unsafe"

	"github.com/cilium/ebpf"
	"golang.org/x/sys/unix"

	"github.com/millrace/millrace/kernel/bpfmap"
	"github.com/millrace/millrace/kernel/nft"
	"github.com/millrace/millrace/layer"
)

// Leave implements layer.Layer. From now on the programs begin no flow (handover), and
// without tables no endpoint serves, so that datagrams, which know no end, go to
// whoever serves beside. TCP connections that are translated packet by packet go on,
// and while it is called again and again, nobody else gets their ports of the node.
// Flows that have ended are forgotten, and their ports are free.
func (l *Layer) Leave() (layer.Changes, error) {
	lock, err := lockFolder(l.settings.Pins)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	defer lock.Close()
	// First: what others translate has to be tracked.
	changes, err := l.bypassRemoval()
	if err == nil {
		_, err = changes.Remove()
	}
	if err != nil {
		return nil, err
	}
	for _, prefix := range []string{"", nextPrefix} { // an upgrade may have been cut short
		if err := errors.Join(l.beginNothing(prefix), l.forgetEnded(prefix)); err != nil {
			return changes, fmt.Errorf("leave: %w", err)
		}
	}
	return changes, nil
}

// beginNothing works on the pins of this prefix, if there are any.
func (l *Layer) beginNothing(prefix string) error {
	handover, err := l.openPin(prefix + datapathMapHandover)
	if err == nil && handover != nil {
		err = handover.Put(uint32(0), uint32(1))
		handover.Close()
	}
	if err != nil {
		return err
	}
	for _, name := range tableMaps { // a Service goes before what it leads to
		if err := l.empty(prefix + name); err != nil {
			return err
		}
	}
	awaitRunning()
	return nil
}

// empty removes every entry of a pinned map, however that is laid out.
func (l *Layer) empty(name string) error {
	m, err := l.openPin(name)
	if m == nil || err != nil {
		return err
	}
	defer m.Close()
	var keys [][]byte
	err = bpfmap.Walk(m, func(key, _ []byte) error {
		keys = append(keys, bytes.Clone(key))
		return nil
	})
	for _, key := range keys {
		err = errors.Join(err, gone(m.Delete(key)))
	}
	if err != nil {
		return fmt.Errorf("empty %s: %w", name, err)
	}
	return nil
}

// openPin opens a pinned map; without one it is nil.
func (l *Layer) openPin(name string) (*ebpf.Map, error) {
	m, err := ebpf.LoadPinnedMap(filepath.Join(l.settings.Pins, name), nil)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("open pinned map %s: %w", name, err)
	}
	return m, nil
}

// flowTable is the packet path's flows, where they are pinned.
type flowTable struct {
	pinned *ebpf.Map
	flows  map[datapathTuple]datapathTranslation
	// same says that they are laid out as this version's.
	same bool
}

// readFlows reads the flows pinned with this prefix; close the map, which is nil where
// there are none.
func (l *Layer) readFlows(prefix string) (t flowTable, err error) {
	spec, err := loadDatapath()
	if err != nil {
		return t, fmt.Errorf("read embedded programs: %w", err)
	}
	m, err := l.openPin(prefix + datapathMapTranslations)
	if m == nil || err != nil {
		return t, err
	}
	t.same = sameLayout(m, spec.Maps[datapathMapTranslations])
	if t.pinned, err = inOurLayout(m, spec.Maps[datapathMapTranslations]); err != nil {
		return t, err
	}
	if t.flows, err = bpfmap.New[datapathTuple, datapathTranslation](t.pinned).All(); err != nil {
		t.pinned.Close()
	}
	return t, err
}

// Left implements layer.Layer: TCP connections of the packet path, of pods and by the
// wire. Those that begin at the socket do not need the layer.
func (l *Layer) Left() (left int, err error) {
	for _, prefix := range []string{"", nextPrefix} {
		t, err := l.readFlows(prefix)
		if err != nil {
			return 0, err
		}
		t.pinned.Close()
		left += len(openConnections(t.flows))
	}
	return left, nil
}

// openConnections are the TCP connections that were answered, and neither reset nor
// closed by both ends: what their clients send, and what comes back.
func openConnections(flows map[datapathTuple]datapathTranslation) map[datapathTuple]datapathTuple {
	open := map[datapathTuple]datapathTuple{}
	for key, client := range flows {
		if key.Protocol != unix.IPPROTO_TCP || !client.isClients() {
			continue // the reply's entry is looked up by the client's
		}
		back := reverseOf(client.To)
		reply := flows[back]
		closed := client.Flags & reply.Flags & datapathSeenSEEN_FIN
		if reply.Flags&datapathSeenSEEN_REPLY != 0 && (client.Flags|reply.Flags)&datapathSeenSEEN_RST == 0 && closed == 0 {
			open[key] = back
		}
	}
	return open
}

// endedFor is for how many seconds nothing has come of a flow that is forgotten.
const endedFor = 2

// forgetEnded forgets the flows that are no open connections. What another version has
// laid out otherwise stays.
func (l *Layer) forgetEnded(prefix string) error {
	t, err := l.readFlows(prefix)
	if err != nil {
		return err
	}
	defer t.pinned.Close()
	if !t.same {
		return nil
	}
	now, err := monotonicSeconds()
	if err != nil {
		return err
	}
	if err := l.reservePorts(prefix, t.flows); err != nil {
		return err
	}
	ended, clients := endedFlows(t.flows, now)
	if err := l.endMasquerades(prefix, ended); err != nil {
		return err
	}
	for _, key := range ended {
		if err := gone(t.pinned.Delete(key)); err != nil {
			return fmt.Errorf("forget a flow: %w", err)
		}
	}
	return l.countEnded(prefix, clients)
}

// reservedFor is how long source ports stay reserved after the last Leave: who removes
// the layer calls it every second.
const reservedFor = 30 * time.Second

// reservePorts keeps whoever masquerades beside from giving the ports of the node that
// open connections have to others.
func (l *Layer) reservePorts(prefix string, flows map[datapathTuple]datapathTranslation) error {
	rules := nft.In(l.settings.Netns)
	if others, err := rules.Tracking(); err != nil || !others.Asked {
		return nil // nobody masquerades, or who does cannot be told
	}
	m, err := l.openPin(prefix + datapathMapMasquerades)
	if m == nil || err != nil {
		return err
	}
	defer m.Close()
	var open []nft.Connection
	for _, back := range openConnections(flows) {
		var out datapathMasquerade
		going := reverseOf(back)
		if m.Lookup(going, &out) == nil && out.To.Destination == going.Destination {
			open = append(open, nft.Connection{From: endOf(out.To.Source, out.To.SourcePort), To: endOf(going.Destination, going.DestinationPort)})
		}
	}
	return rules.Reserve(open, reservedFor)
}

// endedFlows are the keys of flows that are no open connections, and how many of them
// are clients'; now is in seconds since boot.
func endedFlows(flows map[datapathTuple]datapathTranslation, now uint32) (ended []datapathTuple, clients int64) {
	stay := map[datapathTuple]bool{}
	for key, back := range openConnections(flows) {
		stay[key], stay[back] = true, true
	}
	for key, flow := range flows {
		if stay[key] || int32(now-flow.Seen) < endedFor {
			continue
		}
		ended = append(ended, key)
		if flow.isClients() {
			clients++
		}
	}
	return ended, clients
}

// endMasquerades forgets what flows with these keys were masqueraded as.
func (l *Layer) endMasquerades(prefix string, ended []datapathTuple) error {
	m, err := l.openPin(prefix + datapathMapMasquerades)
	if m == nil || err != nil {
		return err
	}
	defer m.Close()
	for _, key := range ended {
		var out datapathMasquerade
		going := reverseOf(key) // of the replies' entry: what goes to the endpoint
		if m.Lookup(going, &out) != nil || out.To.Destination != going.Destination {
			continue
		}
		if err := errors.Join(gone(m.Delete(going)), gone(m.Delete(reverseOf(out.To)))); err != nil {
			return fmt.Errorf("forget a masqueraded flow: %w", err)
		}
	}
	return nil
}

func (l *Layer) countEnded(prefix string, clients int64) error {
	usage, err := l.openPin(prefix + datapathMapFlowUsage)
	if usage == nil || err != nil || clients == 0 {
		return err
	}
	defer usage.Close()
	return addFlows(usage, int16(unsafe.Offsetof(datapathUsage{}.Flows)), -clients)
}

// reverseOf is reverse() of translation.h.
func reverseOf(t datapathTuple) datapathTuple {
	t.Source, t.Destination = t.Destination, t.Source
	t.SourcePort, t.DestinationPort = t.DestinationPort, t.SourcePort
	return t
}

// takeBack makes programs that were leaving begin flows again.
func (d *datapath) takeBack() error {
	pinned, err := ebpf.LoadPinnedMap(d.pin(datapathMapHandover), nil)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("open pinned map %s: %w", datapathMapHandover, err)
	}
	defer pinned.Close()
	if err := pinned.Put(uint32(0), uint32(0)); err != nil {
		return fmt.Errorf("write %s: %w", datapathMapHandover, err)
	}
	return nil
}
