package probe

import (
	"encoding/binary"
	"errors"
	"net/netip"
	"os"
	"slices"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/millrace/millrace/kernel/link"
)

// notes opens one at a device of a namespace, and says what its number is.
func (s *street) notes(space, device string, six bool) *Notes {
	s.t.Helper()
	n, err := OpenNotes(space, s.index(space, device), six)
	if err != nil {
		s.t.Fatal(err)
	}
	s.t.Cleanup(func() { n.Close() })
	return n
}

func (s *street) index(space, device string) int {
	s.t.Helper()
	n, err := link.Open(space)
	if err != nil {
		s.t.Fatal(err)
	}
	defer n.Close()
	index, err := n.Index(device)
	if err != nil {
		s.t.Fatal(err)
	}
	return index
}

// mac is by which hardware address a namespace reaches an address.
func (s *street) mac(space, device string, of netip.Addr) (mac [6]byte) {
	s.t.Helper()
	found, err := link.Neighbour(s.t.Context(), space, s.index(space, device), of)
	if err != nil {
		s.t.Fatal(err)
	}
	copy(mac[:], found)
	return mac
}

// next waits for a note, at most 5 s.
func next(t *testing.T, n *Notes) (Note, bool) {
	t.Helper()
	if err := n.file.SetReadDeadline(time.Now().Add(5 * time.Second)); err != nil {
		t.Fatal(err)
	}
	note, err := n.Receive()
	if err != nil && !errors.Is(err, os.ErrDeadlineExceeded) {
		t.Error(err)
	}
	return note, err == nil
}

// A note with addresses that nobody has arrives, and so does its answer; one with the hosts'
// own does, too, and what the kernel answers to it is none.
func TestNotes(t *testing.T) {
	s := newStreet(t)
	for _, row := range []struct{ here, middle, from, to string }{
		{"10.1.0.1", "10.1.0.254", "10.244.1.0", "10.244.2.0"}, {"10.1.0.1", "10.1.0.254", "10.1.0.1", "10.1.0.254"},
		{"fd00:1::1", "fd00:1::254", "fd00:244:1::", "fd00:244:2::"}, {"fd00:1::1", "fd00:1::254", "fd00:1::1", "fd00:1::254"},
	} {
		ask := Note{From: netip.MustParseAddr(row.from), To: netip.MustParseAddr(row.to), Said: 5, About: 0x89abcdef, Token: 0x0123456789abcdef}
		six := ask.From.Is6()
		here, middle := s.notes(s.here, "eth0", six), s.notes(s.middle, "west", six)
		ask.MAC = s.mac(s.here, "eth0", netip.MustParseAddr(row.middle))
		var answer Note
		for range 2 { // a first packet may go while the devices come up
			if err := here.Send(ask); err != nil {
				t.Fatal(err)
			}
			got, came := next(t, middle)
			answer = Note{From: got.To, To: got.From, MAC: got.MAC, Answer: true, Token: got.Token, Said: 3, About: got.About}
			if got.MAC = ask.MAC; !came || got != ask {
				t.Errorf("sent %+v, and there came %+v", ask, got)
			}
		}
		if answer.MAC != s.mac(s.middle, "west", netip.MustParseAddr(row.here)) {
			t.Errorf("%s is said to have sent it by %x", row.from, answer.MAC)
		}
		if err := middle.Send(answer); err != nil {
			t.Fatal(err)
		}
		back, came := next(t, here)
		if back.MAC = answer.MAC; !came || back != answer {
			t.Errorf("answered %+v, and there came %+v", answer, back)
		}
	}
}

// A Receive that waits ends with Close; one at a device that goes, with what befell it.
func TestNotesEnd(t *testing.T) {
	s := newStreet(t)
	for _, row := range []struct {
		what string
		end  func(*Notes)
		want error
	}{
		{"closed", func(n *Notes) { n.Close() }, os.ErrClosed},
		{"the device is away", func(*Notes) { s.shell(s.here, "ip link del eth0") }, unix.ENETDOWN},
	} {
		n := s.notes(s.here, "eth0", false)
		ended := make(chan error, 1)
		go func() { _, err := n.Receive(); ended <- err }()
		row.end(n)
		select {
		case err := <-ended:
			if !errors.Is(err, row.want) {
				t.Errorf("%s: %v", row.what, err)
			}
		case <-time.After(10 * time.Second):
			t.Fatalf("%s: it waits on", row.what)
		}
	}
	if _, err := OpenNotes(s.here, 4711, false); !errors.Is(err, ErrUnsent) {
		t.Errorf("at a device that is not there: %v", err)
	}
	if _, err := link.Neighbour(t.Context(), s.middle, s.index(s.middle, "east"), netip.MustParseAddr("10.2.0.7")); !errors.Is(err, link.ErrNoNeighbour) {
		t.Errorf("a neighbour that is not there: %v", err)
	}
}

// What differs from a note in anything is none.
func TestNoNote(t *testing.T) {
	for _, six := range []bool{false, true} {
		b, header := example(six), ip4Header
		if six {
			header = ip6Header
		}
		if n, ok := parseNote(b, six); !ok || n.Token != 7 || n.Said != 1 || n.Answer {
			t.Fatalf("IPv6 %v: %+v, %v", six, n, ok)
		}
		if _, ok := parseNote(b, !six); ok {
			t.Errorf("IPv6 %v: taken for one of the other family", six)
		}
		for i := range b {
			if six && (i == 0 || i == 1 || i == 2 || i == 3 || i == 7) || !six && i >= header {
				continue // class, label and hops; below with a right checksum
			}
			other := slices.Clone(b)
			other[i] ^= 0x10
			if _, ok := parseNote(other, six); ok {
				t.Errorf("IPv6 %v: byte %d is another, and it is a note", six, i)
			}
		}
		for what, change := range map[string]func(text []byte){
			"a reply as the kernel makes it": func(text []byte) { text[0] = map[bool]byte{false: echoReply4, true: echoReply6}[six] },
			"another version":                func(text []byte) { text[icmpHeader+8]++ },
			"another mark":                   func(text []byte) { text[icmpHeader]++ },
			"another code":                   func(text []byte) { text[1] = 1 },
			"an answer that asks":            func(text []byte) { text[icmpHeader+9] = kindAnswer },
		} {
			other := slices.Clone(b)
			text := other[header:]
			change(text)
			binary.BigEndian.PutUint16(text[2:], 0)
			if six {
				binary.BigEndian.PutUint16(text[2:], checksum(withPseudoHeader(other, text)))
			} else {
				binary.BigEndian.PutUint16(text[2:], checksum(text))
			}
			if _, ok := parseNote(other, six); ok {
				t.Errorf("IPv6 %v: %s is a note", six, what)
			}
		}
	}
}

func example(six bool) []byte {
	n := Note{From: netip.MustParseAddr("10.244.1.0"), To: netip.MustParseAddr("10.244.2.0"), Said: 1, Token: 7}
	if six {
		n.From, n.To = netip.MustParseAddr("fd00:244:1::"), netip.MustParseAddr("fd00:244:2::")
	}
	return n.packet()
}

// FuzzNote: anything may come. What is taken for a note is one: made anew it is the same in all
// that a note says.
func FuzzNote(f *testing.F) {
	for _, six := range []bool{false, true} {
		f.Add(example(six), six)
		f.Add(example(six)[:30], six)
	}
	f.Fuzz(func(t *testing.T, b []byte, six bool) {
		n, ok := parseNote(b, six)
		if !ok {
			return
		}
		if again, ok := parseNote(n.packet(), six); !ok || again != n {
			t.Errorf("%x is %+v, and that is %+v, %v", b, n, again, ok)
		}
	})
}
