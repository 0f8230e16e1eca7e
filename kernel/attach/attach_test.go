package attach

import (
	"encoding/binary"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/asm"
	"github.com/cilium/ebpf/link"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/millrace/millrace/kernel/bpfmap"
	"github.com/millrace/millrace/kernel/netns"
)

// loopback is the device of every namespace.
const loopback = 1

// place is a namespace, a folder for pins and a program that lets all pass.
type place struct {
	*testing.T
	hook    Hook
	pins    string
	program *ebpf.Program
}

func newPlace(t *testing.T, side ebpf.AttachType) *place {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("making network namespaces needs root")
	}
	p := &place{T: t, pins: t.TempDir()}
	p.must(unix.Mount("bpf", p.pins, "bpf", 0, ""))
	t.Cleanup(func() { p.must(unix.Unmount(p.pins, unix.MNT_DETACH)) })
	path := filepath.Join(t.TempDir(), "node")
	p.must(netns.Create(path))
	t.Cleanup(func() { p.must(netns.Remove(path)) })
	p.hook = Hook{Netns: path, Device: loopback, Name: "lo", Attach: side}
	p.program = p.passing("mine")
	return p
}

func (p *place) must(err error) {
	p.Helper()
	if err != nil {
		p.Fatal(err)
	}
}

func (p *place) passing(name string) *ebpf.Program {
	p.Helper()
	program, err := ebpf.NewProgram(&ebpf.ProgramSpec{
		Name: name, Type: ebpf.SchedCLS, License: "GPL", Instructions: asm.Instructions{asm.Mov.Imm(asm.R0, -1), asm.Return()},
	})
	p.must(err)
	p.Cleanup(func() { program.Close() })
	return program
}

// expect compares what an attachment says of itself.
func (p *place) expect(what string, a Attachment, alive, kept bool) {
	p.Helper()
	if a.Alive() != alive || a.Kept() != kept {
		p.Errorf("%s: alive %v, kept %v; not %v and %v", what, a.Alive(), a.Kept(), alive, kept)
	}
}

func (p *place) queueing() (kinds []string) {
	p.Helper()
	p.must(netns.Do(p.hook.Netns, func() error {
		found, err := netlink.QdiscList(&netlink.Device{LinkAttrs: netlink.LinkAttrs{Index: loopback}})
		for _, q := range found {
			kinds = append(kinds, q.Type())
		}
		return err
	}))
	return kinds
}

func (p *place) hasClsact() bool {
	p.Helper()
	for _, kind := range p.queueing() {
		if kind == "clsact" {
			return true
		}
	}
	return false
}

func TestLinkOutlivesTheProcess(t *testing.T) {
	p := newPlace(t, ebpf.AttachTCXEgress)
	if !HaveTCX() {
		return // TestFilterStandsForALink is of such kernels
	}
	pin := filepath.Join(p.pins, "link_mine")
	made, err := p.hook.TCX(p.program, link.Tail(), pin)
	p.must(err)
	p.expect("before Keep", made, true, false)
	p.must(made.Keep())
	p.expect("after Keep", made, true, true)
	p.must(os.Remove(pin))
	p.expect("somebody removed the pin", made, true, false)
	p.must(made.Keep())
	p.expect("brought back", made, true, true)
	id := made.ID()
	made.Close()

	next, err := p.hook.Open(pin)
	p.must(err)
	if next.ID() != id || id == 0 {
		t.Errorf("link %d, not %d", next.ID(), id)
	}
	p.must(next.Run(p.passing("next")))
	p.expect("the next process' program", next, true, true)
	elsewhere, err := Hook{Netns: p.hook.Netns, Device: loopback + 1, Attach: p.hook.Attach}.Open(pin)
	p.must(err)
	defer elsewhere.Close()
	p.expect("as one of another device", elsewhere, false, true)

	p.must(next.Detach())
	p.expect("detached", elsewhere, false, false)
	if _, err := os.Stat(pin); !os.IsNotExist(err) {
		t.Errorf("the pin is still there: %v", err)
	}
}

// A pin that leads to another link is not removed with this one, and is replaced by Keep.
func TestPinOfAnother(t *testing.T) {
	p := newPlace(t, ebpf.AttachTCXIngress)
	if !HaveTCX() {
		return // TestFilterStandsForALink is of such kernels
	}
	pin := filepath.Join(p.pins, "link_mine")
	first, err := p.hook.TCX(p.program, link.Tail(), pin)
	p.must(err)
	second, err := p.hook.TCX(p.passing("second"), link.Tail(), pin)
	p.must(err)
	p.must(first.Keep())
	p.must(second.Keep())
	p.expect("first", first, true, false)
	p.expect("second", second, true, true)
	p.must(first.Detach())
	p.expect("second, when the first has gone", second, true, true)
	p.must(RemovePin(pin))
	p.expect("second, when its pin was removed as well as the link", second, false, false)
	p.must(RemovePin(pin)) // absent is success
	second.Close()
}

func TestFilterStandsForALink(t *testing.T) {
	for _, side := range []ebpf.AttachType{ebpf.AttachTCXIngress, ebpf.AttachTCXEgress} {
		p := newPlace(t, side)
		mine := &Filter{Hook: p.hook, Program: "mine", Priority: 7}
		p.expect("before", mine, false, true)
		p.must(mine.Begin(p.program))
		p.expect("begun", mine, true, true)
		before := mine.ID()
		p.must(mine.Run(p.passing("next")))
		if now := mine.ID(); now == before || now == 0 {
			t.Errorf("program %d, and %d before", now, before)
		}
		other := &Filter{Hook: p.hook, Program: "other", Priority: 8}
		p.must(other.Begin(p.program))
		p.must(mine.Detach())
		p.expect("detached", mine, false, true)
		p.expect("the other's", other, true, true)
		if !p.hasClsact() {
			t.Errorf("the qdisc is gone, and the other's filter: %v", p.queueing())
		}
		p.must(other.Detach())
		if p.hasClsact() {
			t.Errorf("left at the device: %v", p.queueing())
		}
		p.must(mine.Detach()) // absent is success
	}
}

// A filter that had another's place in earlier versions is taken over from there, and what
// has that place since is not touched.
func TestFilterFromAFormerPlace(t *testing.T) {
	p := newPlace(t, ebpf.AttachTCXIngress)
	earlier := &Filter{Hook: p.hook, Program: "mine", Priority: OrderAnswers}
	p.must(earlier.Begin(p.program))
	mine := &Filter{Hook: p.hook, Program: "mine", Priority: OrderQueries, Former: OrderAnswers}
	p.expect("an earlier version's", mine, true, true)
	if mine.ID() != earlier.ID() {
		t.Errorf("program %d, not %d", mine.ID(), earlier.ID())
	}
	p.must(mine.Run(p.passing("next")))
	p.expect("taken over", mine, true, true)
	p.expect("in the former place", earlier, false, true)
	other := &Filter{Hook: p.hook, Program: "other", Priority: OrderAnswers}
	p.must(other.Begin(p.program))
	p.must(mine.Run(p.program))
	p.expect("beside another in its former place", mine, true, true)
	p.must(mine.Detach())
	p.expect("detached", mine, false, true)
	p.expect("the other, in the former place", other, true, true)
	p.must(other.Detach())
	p.must(earlier.Begin(p.program))
	p.must(mine.Detach()) // also what an earlier version left
	if earlier.Alive() || p.hasClsact() {
		t.Errorf("left at the device: %v", p.queueing())
	}
}

// Of two links of one pin there is a pin all the time, and whatever moment a process is killed
// in, the next one has one of them and not both.
func TestLinkComesInPlaceOfAnother(t *testing.T) {
	p := newPlace(t, ebpf.AttachTCXIngress)
	if !HaveTCX() {
		return // filters have no pins
	}
	folder := filepath.Join(p.pins, "mine")
	p.must(os.Mkdir(folder, 0o700))
	pin := filepath.Join(folder, "link_mine")
	linked := func(name string) *Link {
		made, err := p.hook.TCX(p.passing(name), link.Tail(), pin)
		p.must(err)
		return made
	}
	first, second := linked("first"), linked("second")
	p.must(first.Keep())
	removed := p.removals(folder)
	p.must(second.Keep())
	p.must(os.Mkdir(filepath.Join(folder, "seen"), 0o700))
	p.must(os.Remove(filepath.Join(folder, "seen")))
	if names := removed(); !slices.Equal(names, []string{"seen"}) {
		t.Errorf("removed were %q", names)
	}
	p.expect("the first", first, true, false)
	p.expect("the second", second, true, true)
	p.must(first.Detach())
	p.expect("the first has gone; the second", second, true, true)

	third := linked("third")
	p.must(third.Kernel.Pin(pin + bpfmap.NextSuffix)) // and then it is killed
	third.Close()
	second.Close()
	next, err := p.hook.Open(pin)
	p.must(err)
	if order := p.order(); !slices.Equal(order, []string{"second"}) {
		t.Errorf("in force are %q", order)
	}
	p.must(next.Detach())
	if left, err := os.ReadDir(folder); err != nil || len(left) > 0 {
		t.Errorf("left are %v, %v", left, err)
	}
}

// removals begins to watch a folder of pins, and returns what says which were removed.
func (p *place) removals(folder string) func() []string {
	p.Helper()
	fd, err := unix.InotifyInit1(unix.IN_CLOEXEC | unix.IN_NONBLOCK)
	p.must(err)
	p.Cleanup(func() { unix.Close(fd) })
	_, err = unix.InotifyAddWatch(fd, folder, unix.IN_DELETE)
	p.must(err)
	return func() (names []string) {
		p.Helper()
		buffer := make([]byte, 4096)
		n, err := unix.Read(fd, buffer)
		p.must(err)
		for at := 0; at < n; { // inotify(7): the length of the name is the last of four words
			end := at + unix.SizeofInotifyEvent + int(binary.NativeEndian.Uint32(buffer[at+12:]))
			names = append(names, strings.TrimRight(string(buffer[at+unix.SizeofInotifyEvent:end]), "\x00"))
			at = end
		}
		return names
	}
}
