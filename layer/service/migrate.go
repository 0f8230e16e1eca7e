package service

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"runtime"
	"slices"
	"strings"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/asm"
	"github.com/cilium/ebpf/link"

	"github.com/millrace/millrace/kernel/bpfmap"
)

// carryTables fills this version's Service tables from those of another one.
// Nobody writes either meanwhile. Ids and numbers stay, so flows that know them
// need no change.
func (d *datapath) carryTables() error {
	for _, name := range slices.Concat(ruleMaps, tableMaps) {
		from, to := d.left[name], d.maps[name]
		if from == nil {
			continue
		}
		if err := carryMap(name, from, to); err != nil {
			return fmt.Errorf("carry %s over from another version: %w", name, err)
		}
		from.Close()
		delete(d.left, name)
	}
	return nil
}

// inOurLayout is a map itself, or where it is another version's, a copy in this
// one's layout; the map is closed then. It changes nothing.
func inOurLayout(m *ebpf.Map, spec *ebpf.MapSpec) (*ebpf.Map, error) {
	if sameLayout(m, spec) {
		return m, nil
	}
	defer m.Close()
	spec = spec.Copy()
	spec.MaxEntries = m.MaxEntries()
	copied, err := ebpf.NewMap(spec)
	if err != nil {
		return nil, err
	}
	if err := carryMap(spec.Name, m, copied); err != nil {
		copied.Close()
		return nil, err
	}
	return copied, nil
}

// carryMap copies every entry of a map to one of another layout.
func carryMap(name string, from, to *ebpf.Map) error {
	t, err := translatorBetween(name, from, to)
	if err != nil {
		return err
	}
	return bpfmap.Copy(from, to, func(key, value, newKey, newValue []byte) {
		carry(t.key, key, newKey)
		carry(t.value, value, newValue)
	})
}

// flowCarrier carries the flows of the packet path over while packets pass: those
// that the old programs know, who begin no new ones any more (handover), are
// copied to where the new programs begin theirs.
type flowCarrier struct {
	from, to             map[string]*ebpf.Map
	translations, places *translator
	flags, flows         field
	reply                []step // from a client's entry to the key of its replies
	become               []step // what an entry says that packets become, to itself
	// free are places that no flow of the new programs will take for long: they
	// begin with the first, and there are twice as many as flows (flowPlaces).
	free []uint32
}

// newFlowCarrier looks which places are free. Without flows to carry it is nil.
func newFlowCarrier(from, to map[string]*ebpf.Map) (*flowCarrier, error) {
	if from[datapathMapTranslations] == nil || from[datapathMapPlaces] == nil {
		return nil, nil
	}
	c := &flowCarrier{from: from, to: to}
	var err error
	if c.translations, err = c.translator(datapathMapTranslations); err != nil {
		return nil, err
	}
	if c.places, err = c.translator(datapathMapPlaces); err != nil {
		return nil, err
	}
	usage, err := layoutOf(to[datapathMapFlowUsage])
	if err != nil {
		return nil, err
	}
	c.flows = usage.value.find("flows")
	c.flags = c.translations.to.value.find("flags")
	c.reply = reversed(c.translations.from)
	become := c.translations.to.value.below("to")
	c.become = steps(become, become)
	protocol := c.places.to.value.find("protocol")
	err = bpfmap.Walk(to[datapathMapPlaces], func(place, key []byte) error {
		if key[protocol.at] == 0 {
			c.free = append(c.free, binary.NativeEndian.Uint32(place))
		}
		return nil
	})
	return c, err
}

func (c *flowCarrier) translator(name string) (*translator, error) {
	return translatorBetween(name, c.from[name], c.to[name])
}

// run carries what is there and not yet carried, and what was noted since of
// flows that are. It can be run again.
func (c *flowCarrier) run() error {
	var keys [][]byte
	protocol := c.places.from.value.find("protocol")
	err := bpfmap.Walk(c.from[datapathMapPlaces], func(_, key []byte) error {
		if key[protocol.at] != 0 {
			keys = append(keys, bytes.Clone(key))
		}
		return nil
	})
	for _, key := range keys {
		if err == nil {
			err = c.flow(key)
		}
	}
	if err == nil {
		err = c.count()
	}
	if err != nil {
		return fmt.Errorf("carry flows over from another version: %w", err)
	}
	return nil
}

// flow carries the flow with this key of a client, in its own layout.
func (c *flowCarrier) flow(key []byte) error {
	client, err := c.read(key)
	if client == nil || err != nil {
		return err
	}
	back := make([]byte, len(key))
	carry(c.reply, client, back)
	reply, err := c.read(back)
	if reply == nil || err != nil {
		return err
	}
	newKey, newClient := c.carried(key, client)
	newBack, newReply := c.carried(back, reply)
	if err := c.write(newBack, newReply, false); err != nil {
		return err
	}
	return c.write(newKey, newClient, true)
}

// read reads an entry of the old programs; nil if there is none.
func (c *flowCarrier) read(key []byte) ([]byte, error) {
	value, err := c.from[datapathMapTranslations].LookupBytes(key)
	return value, err
}

// carried is an entry in the new programs' layout.
func (c *flowCarrier) carried(key, value []byte) (newKey, newValue []byte) {
	newKey, newValue = make([]byte, c.to[datapathMapTranslations].KeySize()), make([]byte, c.to[datapathMapTranslations].ValueSize())
	carry(c.translations.key, key, newKey)
	carry(c.translations.value, value, newValue)
	return newKey, newValue
}

// reversed is reverse() of translation.h, of what a client's packets become.
func reversed(at layout) []step {
	var swapped fields
	for _, f := range at.value.below("to") {
		if rest, ok := strings.CutPrefix(f.name, "source"); ok {
			f.name = "destination" + rest
		} else if rest, ok := strings.CutPrefix(f.name, "destination"); ok {
			f.name = "source" + rest
		}
		swapped = append(swapped, f)
	}
	return steps(swapped, at.key)
}

// write makes an entry for the new programs, or notes in the one that is there
// what the old ones have seen since. A client's entry gets a place first.
func (c *flowCarrier) write(key, value []byte, client bool) error {
	m := c.to[datapathMapTranslations]
	there, err := m.LookupBytes(key)
	if err != nil {
		return err
	}
	if there != nil {
		return c.note(key, there, value)
	}
	if client {
		if len(c.free) == 0 {
			return errors.New("there is no place for them")
		}
		place := c.free[len(c.free)-1]
		c.free = c.free[:len(c.free)-1]
		if err := c.to[datapathMapPlaces].Put(place, key); err != nil {
			return err
		}
	}
	if err = m.Update(key, value, ebpf.UpdateNoExist); errors.Is(err, ebpf.ErrKeyExist) {
		return nil // the new programs began it just now
	}
	return err
}

// note adds what was seen of a flow to its entry, if that is the same flow.
func (c *flowCarrier) note(key, there, seen []byte) error {
	for _, s := range c.become {
		if !bytes.Equal(there[s.to:s.to+s.size], seen[s.to:s.to+s.size]) {
			return nil
		}
	}
	flags := binary.NativeEndian.Uint32(there[c.flags.at:]) | binary.NativeEndian.Uint32(seen[c.flags.at:])
	if flags == binary.NativeEndian.Uint32(there[c.flags.at:]) {
		return nil
	}
	binary.NativeEndian.PutUint32(there[c.flags.at:], flags)
	err := c.to[datapathMapTranslations].Update(key, there, ebpf.UpdateExist)
	if errors.Is(err, ebpf.ErrKeyNotExist) {
		return nil // it has ended
	}
	return err
}

// count corrects the number of flows.
func (c *flowCarrier) count() error {
	entries := 0
	err := bpfmap.Walk(c.to[datapathMapTranslations], func(_, _ []byte) error {
		entries++
		return nil
	})
	if err != nil {
		return err
	}
	usage := c.to[datapathMapFlowUsage]
	value, err := usage.LookupBytes(uint32(0))
	if err != nil {
		return err
	}
	return addFlows(usage, int16(c.flows.at), int64(entries/2)-int64(binary.NativeEndian.Uint64(value[c.flows.at:])))
}

// addFlows adds to the number of flows, which lies at an offset. Programs count too,
// meanwhile, so a program does it, at once.
func addFlows(usage *ebpf.Map, at int16, by int64) error {
	add := asm.StoreXAdd(asm.R0, asm.R1, asm.DWord)
	add.Offset = at
	program, err := ebpf.NewProgram(&ebpf.ProgramSpec{
		Type: ebpf.SchedCLS, License: "Dual MIT/GPL",
		Instructions: asm.Instructions{
			asm.StoreImm(asm.RFP, -4, 0, asm.Word),
			asm.LoadMapPtr(asm.R1, usage.FD()),
			asm.Mov.Reg(asm.R2, asm.RFP),
			asm.Add.Imm(asm.R2, -4),
			asm.FnMapLookupElem.Call(),
			asm.JEq.Imm(asm.R0, 0, "end"),
			asm.LoadImm(asm.R1, by, asm.DWord),
			add,
			asm.Mov.Imm(asm.R0, 0).WithSymbol("end"),
			asm.Return(),
		},
	})
	if err != nil {
		return err
	}
	defer program.Close()
	_, err = program.Run(&ebpf.RunOptions{Data: make([]byte, 64)})
	return err
}

// carrySockets copies what the sockets remember. Only the kernel can walk over
// sockets, so a program does it, for each that has an entry of the old layout and
// none of the new one.
func carrySockets(name string, from, to *ebpf.Map) error {
	t, err := translatorBetween(name, from, to)
	if err != nil {
		return err
	}
	program, err := ebpf.NewProgram(&ebpf.ProgramSpec{
		Name: "carry", Type: ebpf.Tracing, AttachType: ebpf.AttachTraceIter, AttachTo: "bpf_sk_storage_map",
		License: "Dual MIT/GPL", Instructions: socketSteps(t.value, to),
	})
	runtime.KeepAlive(to) // the instructions know its descriptor only
	if err != nil {
		return fmt.Errorf("load the program that walks over sockets: %w", err)
	}
	defer program.Close()
	walk, err := link.AttachIter(link.IterOptions{Program: program, Map: from})
	if err != nil {
		return fmt.Errorf("walk over sockets: %w", err)
	}
	defer walk.Close()
	run, err := walk.Open()
	if err != nil {
		return fmt.Errorf("walk over sockets: %w", err)
	}
	defer run.Close()
	if _, err := io.Copy(io.Discard, run); err != nil {
		return fmt.Errorf("walk over sockets: %w", err)
	}
	return nil
}

// Where struct bpf_iter__bpf_sk_storage_map keeps the socket and its entry
// (net/core/bpf_sk_storage.c).
const (
	iterSocket = 16
	iterValue  = 24
)

// socketSteps is the program: it makes the new value on its stack and stores it
// in the socket.
func socketSteps(steps []step, to *ebpf.Map) asm.Instructions {
	size := int(to.ValueSize()+7) &^ 7
	code := asm.Instructions{
		asm.LoadMem(asm.R6, asm.R1, iterSocket, asm.DWord),
		asm.JEq.Imm(asm.R6, 0, "end"),
		asm.LoadMem(asm.R7, asm.R1, iterValue, asm.DWord),
		asm.JEq.Imm(asm.R7, 0, "end"),
		asm.Mov.Imm(asm.R0, 0),
	}
	for at := 0; at < size; at += 8 {
		code = append(code, asm.StoreMem(asm.RFP, int16(at-size), asm.R0, asm.DWord))
	}
	for _, s := range steps {
		for done := 0; done < s.size; {
			width, n := access(s.from+done, s.to+done, s.size-done)
			code = append(code,
				asm.LoadMem(asm.R0, asm.R7, int16(s.from+done), width),
				asm.StoreMem(asm.RFP, int16(s.to+done-size), asm.R0, width))
			done += n
		}
	}
	return append(code,
		asm.LoadMapPtr(asm.R1, to.FD()),
		asm.Mov.Reg(asm.R2, asm.R6),
		asm.Mov.Reg(asm.R3, asm.RFP),
		asm.Add.Imm(asm.R3, int32(-size)),
		asm.Mov.Imm(asm.R4, 1), // BPF_SK_STORAGE_GET_F_CREATE
		asm.FnSkStorageGet.Call(),
		asm.Mov.Imm(asm.R0, 0).WithSymbol("end"),
		asm.Return(),
	)
}

// access is the widest one that is aligned at both ends.
func access(from, to, left int) (asm.Size, int) {
	for _, w := range []struct {
		size asm.Size
		n    int
	}{{asm.DWord, 8}, {asm.Word, 4}, {asm.Half, 2}} {
		if from%w.n == 0 && to%w.n == 0 && left >= w.n {
			return w.size, w.n
		}
	}
	return asm.Byte, 1
}
