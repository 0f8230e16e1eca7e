package service

import (
	"cmp"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"os"
	"slices"
	"strings"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/link"
	"golang.org/x/sys/unix"

	"github.com/millrace/millrace/kernel/attach"
	"github.com/millrace/millrace/kernel/bpfmap"
)

// How programs take over from those of another version, whose maps they cannot
// use, without a packet or a call that nobody serves:
//
//  1. The new programs are attached behind the old ones, over maps of their own,
//     with pins of their own (nextPrefix). They get what the old ones leave alone,
//     which is nothing.
//  2. The map handover of the old ones is set. From now on those serve only the
//     flows that they know, and the new programs begin all others.
//  3. What the old ones know is carried over.
//  4. The old programs are detached.
//  5. The new pins take the names of the old ones, that of handover last.
//
// All of it is in the pins, so that after a kill the next process, of whatever
// version, knows what to do: before step 2 what is beside is thrown away, after it
// steps 3 to 5 are done (resume). Where nothing stands beside, handover was set by
// Leave, and is taken back.

// resume finishes what a process that was killed had begun.
func (d *datapath) resume() error {
	if d.settings.Pins == "" {
		return nil
	}
	pinned, err := ebpf.LoadPinnedMap(d.pin(datapathMapHandover), nil)
	if errors.Is(err, fs.ErrNotExist) {
		d.abandon()
		return nil
	}
	if err != nil {
		return fmt.Errorf("open pinned map %s: %w", datapathMapHandover, err)
	}
	defer pinned.Close()
	var begun uint32
	if err := pinned.Lookup(uint32(0), &begun); err != nil {
		return fmt.Errorf("read %s: %w", datapathMapHandover, err)
	}
	if begun == 0 {
		d.abandon()
		return nil
	}
	if err := d.finish(); err != nil {
		return err
	}
	return d.takeBack()
}

// abandon takes away what stands beside, which nobody needs yet.
func (d *datapath) abandon() {
	names, _ := d.beside()
	for _, name := range names {
		_ = attach.RemovePin(d.pin(name))
	}
	_ = d.eachFilterBeside(func(_ hook, f *attach.Filter) error { return f.Detach() })
}

// beside lists the pins of what stands beside, in order.
func (d *datapath) beside() ([]string, error) {
	found, err := os.ReadDir(d.settings.Pins)
	if err != nil {
		return nil, fmt.Errorf("read pin folder: %w", err)
	}
	var names []string
	for _, entry := range found {
		if strings.HasPrefix(entry.Name(), nextPrefix) {
			names = append(names, entry.Name())
		}
	}
	return names, nil
}

// handOver puts programs in force in place of another version's.
func (d *datapath) handOver(next loaded) error {
	if _, err := d.pinBeside(next.maps); err != nil {
		d.abandon()
		return err
	}
	if err := d.attachBeside(next.programs); err != nil {
		d.abandon()
		return err
	}
	if begun := d.left[datapathMapHandover]; begun != nil {
		if err := begun.Put(uint32(0), uint32(1)); err != nil {
			d.abandon()
			return fmt.Errorf("write %s: %w", datapathMapHandover, err)
		}
	}
	// From here on there is only forward: the new programs have flows.
	if err := d.finish(); err != nil {
		return err
	}
	bpfmap.CloseAll(d.left)
	clear(d.left)
	for _, h := range d.hooks() {
		if have := d.attached[h.name]; have != nil {
			have.Close()
			delete(d.attached, h.name)
		}
	}
	return d.openAttachments()
}

// attachBeside attaches programs behind those in force.
func (d *datapath) attachBeside(programs map[string]*ebpf.Program) error {
	for _, h := range d.hooks() {
		have := d.attached[h.name]
		if have == nil || !have.Alive() {
			continue // putInForce attaches it
		}
		pin := d.pin(nextPrefix + linkPrefix + h.name)
		if _, err := os.Stat(pin); err == nil {
			continue // an earlier try was not finished
		}
		anchor := link.Tail()
		if l, ok := have.(linked); ok {
			anchor = link.AfterLink(l.Kernel)
		}
		made, err := d.makeAt(h, programs[h.program], pin, anchor, besidePriority)
		if h.wentAway(err) {
			continue
		}
		if err != nil {
			return err
		}
		err = made.Keep()
		made.Close()
		if err != nil {
			return err
		}
	}
	return nil
}

// finish does what is left to do once the new programs begin the flows.
func (d *datapath) finish() error {
	awaitRunning()
	from, to, err := d.openPairs()
	defer bpfmap.CloseAll(from)
	defer bpfmap.CloseAll(to)
	if err != nil {
		return err
	}
	for _, name := range []string{datapathMapConnected, datapathMapSent} {
		if from[name] != nil {
			d.note(carrySockets(name, from[name], to[name]), "what sockets remember was not carried over from another version")
		}
	}
	flows, err := newFlowCarrier(from, to)
	if err == nil && flows != nil {
		err = flows.run()
	}
	d.note(err, "flows of the packet path were not carried over from another version")
	if from[datapathMapMasquerades] != nil {
		d.note(d.carryMasquerades(from[datapathMapMasquerades], to),
			"masqueraded flows were not carried over from another version")
	}
	if err := d.promote(); err != nil {
		return err
	}
	awaitRunning()
	if flows != nil && err == nil {
		d.note(flows.run(), "flows of the packet path were not wholly carried over from another version")
	}
	return d.takeNames()
}

// carryMasquerades copies the entries of masqueraded flows that were carried over, or
// have stayed where they were; nobody would ever clear the others away.
func (d *datapath) carryMasquerades(from *ebpf.Map, to map[string]*ebpf.Map) error {
	next, flows := to[datapathMapMasquerades], to[datapathMapTranslations]
	if flows == nil {
		stayed, err := ebpf.LoadPinnedMap(d.pin(datapathMapTranslations), nil)
		if err != nil {
			return fmt.Errorf("open pinned map %s: %w", datapathMapTranslations, err)
		}
		defer stayed.Close()
		flows = stayed
	}
	if err := carryMap(datapathMapMasquerades, from, next); err != nil {
		return err
	}
	var over []datapathTuple
	var key datapathTuple
	var value datapathMasquerade
	var reply datapathTranslation
	entries := next.Iterate()
	for entries.Next(&key, &value) {
		// A flow's replies have an entry before it is masqueraded, and until after.
		if err := flows.Lookup(repliesOf(key, value), &reply); errors.Is(err, ebpf.ErrKeyNotExist) {
			over = append(over, key)
		}
	}
	err := entries.Err()
	for _, key := range over {
		err = errors.Join(err, gone(next.Delete(key)))
	}
	return err
}

// repliesOf is what the replies of a masqueraded flow are where they are translated:
// from the endpoint to the client.
func repliesOf(key datapathTuple, value datapathMasquerade) datapathTuple {
	if key.Destination != value.To.Destination { // an answer, which goes to the client
		return value.To
	}
	return reverseOf(key)
}

// note tells a person of what went wrong where going on is better than staying.
func (d *datapath) note(err error, text string) {
	if err != nil {
		d.degraded = append(d.degraded, fmt.Sprintf("%s: %v", text, err))
	}
}

// awaitRunning returns when every program that runs now has ended: membarrier(2)
// waits for that. Where it is not allowed, there are microseconds in which a flow
// may begin unseen.
func awaitRunning() {
	const global = 1 // MEMBARRIER_CMD_GLOBAL
	_, _, _ = unix.Syscall(unix.SYS_MEMBARRIER, global, 0, 0)
}

// openPairs opens the maps of flows of which there are two: in force, and beside.
func (d *datapath) openPairs() (from, to map[string]*ebpf.Map, err error) {
	from, to = map[string]*ebpf.Map{}, map[string]*ebpf.Map{}
	names := append([]string{datapathMapConnected, datapathMapSent}, packetMaps...)
	for _, name := range names {
		next, err := ebpf.LoadPinnedMap(d.pin(nextPrefix+name), nil)
		if errors.Is(err, fs.ErrNotExist) {
			continue
		}
		if err != nil {
			return from, to, fmt.Errorf("open pinned map %s: %w", nextPrefix+name, err)
		}
		to[name] = next
		last, err := ebpf.LoadPinnedMap(d.pin(name), nil)
		if errors.Is(err, fs.ErrNotExist) {
			continue
		}
		if err != nil {
			return from, to, fmt.Errorf("open pinned map %s: %w", name, err)
		}
		from[name] = last
	}
	return from, to, nil
}

// promote detaches what is in force; what stands behind it takes its place.
func (d *datapath) promote() error {
	names, err := d.beside()
	if err != nil {
		return err
	}
	for _, name := range names {
		h := strings.TrimPrefix(name, nextPrefix)
		if !strings.HasPrefix(h, linkPrefix) {
			continue
		}
		if err := attach.RemovePin(d.pin(h)); err != nil {
			return err
		}
		if err := os.Rename(d.pin(name), d.pin(h)); err != nil {
			return fmt.Errorf("pin %s: %w", h, err)
		}
	}
	return d.eachFilterBeside(func(h hook, f *attach.Filter) error {
		program, err := ebpf.NewProgramFromID(ebpf.ProgramID(f.ID()))
		if err != nil {
			return fmt.Errorf("open the program of filter %s of device %d: %w", h.program, h.device, err)
		}
		defer program.Close()
		if err := d.filterAt(h, filterPriority).Run(program); err != nil {
			return fmt.Errorf("switch %s to the new program: %w", h.name, err)
		}
		return f.Detach()
	})
}

// eachFilterBeside calls f with each filter that stands beside.
func (d *datapath) eachFilterBeside(f func(hook, *attach.Filter) error) error {
	if d.tcx {
		return nil
	}
	devices, err := d.devices()
	if err != nil {
		return err
	}
	for _, device := range devices {
		for _, side := range sides {
			for _, h := range portHooks(device.Index, side) {
				beside := d.filterAt(h, besidePriority)
				if !beside.Alive() {
					continue
				}
				if err := f(h, beside); err != nil {
					return err
				}
			}
		}
	}
	return nil
}

// takeNames gives the pins of maps that stand beside the names of those in force.
// A process that finds the versions and the maps out of step must not use them.
func (d *datapath) takeNames() error {
	names, err := d.beside()
	if err != nil {
		return err
	}
	if err := d.markMixed(names); err != nil {
		return err
	}
	// The versions are right when all others are there; then the handover is over.
	late := func(name string) int {
		return slices.Index([]string{nextPrefix + datapathMapSchema, nextPrefix + datapathMapHandover}, name)
	}
	slices.SortStableFunc(names, func(a, b string) int { return cmp.Compare(late(a), late(b)) })
	for _, name := range names {
		to := strings.TrimPrefix(name, nextPrefix)
		if err := os.Rename(d.pin(name), d.pin(to)); err != nil {
			return fmt.Errorf("pin map %s: %w", to, err)
		}
	}
	return nil
}

// markMixed notes in the pinned versions that groups are being replaced.
func (d *datapath) markMixed(names []string) error {
	pinned, err := ebpf.LoadPinnedMap(d.pin(datapathMapSchema), nil)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("open pinned map %s: %w", datapathMapSchema, err)
	}
	defer pinned.Close()
	for _, g := range groups {
		replaced := slices.ContainsFunc(g.maps, func(name string) bool { return slices.Contains(names, nextPrefix+name) })
		if !replaced || uint32(g.number) >= pinned.MaxEntries() {
			continue
		}
		if err := pinned.Put(g.number, mixed); err != nil {
			return fmt.Errorf("write %s: %w", datapathMapSchema, err)
		}
	}
	return nil
}

// roomForLeft is the room that what is left takes in maps of this version. For
// flows it is twice their number, so that the new programs do not come to where
// those are put that are carried over.
func (d *datapath) roomForLeft() (capacity, error) {
	room := roomFor(0, 0)
	for _, name := range slices.Sorted(maps.Keys(d.left)) {
		size := int(d.left[name].MaxEntries())
		switch name {
		case datapathMapServices:
			room.services = max(room.services, size)
		case datapathMapSlots, datapathMapBackends:
			room.backends = max(room.backends, size)
		case datapathMapPlaces:
			d.packets = true
			taken := 0
			free := make([]byte, d.left[name].ValueSize())
			err := bpfmap.Walk(d.left[name], func(_, key []byte) error {
				if string(key) != string(free) {
					taken++
				}
				return nil
			})
			if err != nil {
				return room, err
			}
			d.carried = taken
		}
	}
	return room, nil
}
