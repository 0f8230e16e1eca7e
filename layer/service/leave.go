package service

import (
	"bytes"
	"errors"
	"fmt"
	"io/fs"
	"path/filepath"

	"github.com/cilium/ebpf"
	"golang.org/x/sys/unix"

	"github.com/millrace/millrace/kernel/bpfmap"
	"github.com/millrace/millrace/kernel/nft"
	"github.com/millrace/millrace/layer"
)

// Leave implements layer.Layer. From now on the programs begin no flow (handover), and
// without tables no endpoint serves, so that datagrams, which know no end, go to
// whoever serves beside. TCP connections that are translated packet by packet go on.
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
	if err == nil && len(changes) > 0 {
		err = nft.In(l.settings.Netns).SetUntracked(nil)
	}
	if err != nil {
		return nil, err
	}
	for _, prefix := range []string{"", nextPrefix} { // an upgrade may have been cut short
		if err := l.beginNothing(prefix); err != nil {
			return changes, fmt.Errorf("leave: %w", err)
		}
	}
	awaitRunning()
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

// Left implements layer.Layer: TCP connections of the packet path, of pods and by the
// wire. Those that begin at the socket do not need the layer.
func (l *Layer) Left() (left int, err error) {
	spec, err := loadDatapath()
	if err != nil {
		return 0, fmt.Errorf("read embedded programs: %w", err)
	}
	for _, prefix := range []string{"", nextPrefix} {
		m, err := l.openPin(prefix + datapathMapTranslations)
		if err == nil && m != nil {
			m, err = inOurLayout(m, spec.Maps[datapathMapTranslations])
		}
		if err != nil {
			return 0, err
		}
		if m == nil {
			continue
		}
		flows, err := bpfmap.New[datapathTuple, datapathTranslation](m).All()
		m.Close()
		if err != nil {
			return 0, err
		}
		left += openConnections(flows)
	}
	return left, nil
}

// The flags of struct translation, SEEN_... of translation.h.
const (
	seenFIN   = 1
	seenRST   = 2
	seenReply = 4
)

// openConnections counts the TCP connections that were answered, and neither reset
// nor closed by both ends.
func openConnections(flows map[datapathTuple]datapathTranslation) (open int) {
	for key, client := range flows {
		if key.Protocol != unix.IPPROTO_TCP || client.Role == datapathRoleROLE_TO_POD || client.Flags&seenReply != 0 {
			continue // the reply's entry is looked up by the client's
		}
		reply := flows[reverseOf(client.To)]
		closed := client.Flags & reply.Flags & seenFIN
		if reply.Flags&seenReply != 0 && (client.Flags|reply.Flags)&seenRST == 0 && closed == 0 {
			open++
		}
	}
	return open
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
