package trace

import (
	"bytes"
	"encoding/binary"
	"errors"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// captured is a packet as a reader of the file finds it.
type captured struct {
	through, comment string
	frame            []byte
	at               time.Time
}

// readCapture reads what Capture writes; it refuses what is not as the format wants it.
func readCapture(t *testing.T, b []byte) (packets []captured) {
	t.Helper()
	var interfaces []string
	for first := true; len(b) > 0; first = false {
		if len(b) < 12 {
			t.Fatalf("%d bytes after the last block", len(b))
		}
		kind, length := binary.LittleEndian.Uint32(b), binary.LittleEndian.Uint32(b[4:])
		if length%4 != 0 || int(length) > len(b) || binary.LittleEndian.Uint32(b[length-4:]) != length || first != (kind == sectionHeader) {
			t.Fatalf("a block of kind %#x and length %d, with %d bytes left", kind, length, len(b))
		}
		body := b[8 : length-4]
		b = b[length:]
		switch kind {
		case sectionHeader:
			if binary.LittleEndian.Uint32(body) != byteOrder {
				t.Fatalf("byte order %x", body[:4])
			}
		case interfaceBlock:
			interfaces = append(interfaces, options(t, body[8:])[optionName])
		case packetBlock:
			word := func(at int) uint32 { return binary.LittleEndian.Uint32(body[4*at:]) }
			end := 20 + int(word(3)+3)/4*4
			packets = append(packets, captured{
				through: interfaces[word(0)], frame: body[20 : 20+word(3)],
				at: time.Unix(0, int64(word(1))<<32|int64(word(2))), comment: options(t, body[end:])[optionComment],
			})
		default:
			t.Fatalf("a block of kind %#x", kind)
		}
	}
	return packets
}

func options(t *testing.T, b []byte) map[uint16]string {
	t.Helper()
	all := map[uint16]string{}
	for {
		code, length := binary.LittleEndian.Uint16(b), int(binary.LittleEndian.Uint16(b[2:]))
		if code == 0 {
			if len(b) != 4 {
				t.Fatalf("%d bytes after the end of options", len(b)-4)
			}
			return all
		}
		all[code] = string(b[4 : 4+length])
		b = b[4+(length+3)/4*4:]
	}
}

// Every packet that died is in the file, whole, with the reason; no other is.
func TestCaptureHoldsThePacketsThatDied(t *testing.T) {
	w := newTown(t)
	var file bytes.Buffer
	begun := time.Now()
	c := NewCapture(&file, begun, func(space uint32) string {
		if space == w.inode(w.server) {
			return "server"
		}
		return "other"
	})
	s, err := Watch(Options{Namespaces: []uint32{w.inode(w.server)}, Packets: c.Write})
	w.must(err)
	const packets = 200
	w.inClient(func() error {
		conn, err := net.ListenUDP("udp", &net.UDPAddr{IP: net.ParseIP(client4)})
		if err != nil {
			return err
		}
		defer conn.Close()
		for i := range packets {
			_, err := conn.WriteTo([]byte{'m', byte(i)}, &net.UDPAddr{IP: net.ParseIP(server4), Port: 9})
			if err != nil && !errors.Is(err, unix.ECONNREFUSED) {
				return err
			}
		}
		return nil
	})
	_, err = s.Stop()
	w.must(err)
	w.must(c.Err())
	died := map[byte]int{}
	for _, p := range readCapture(t, file.Bytes()) {
		if !strings.HasPrefix(p.comment, "died: NO_SOCKET in __udp4_lib_rcv, namespace server") {
			continue // neighbours of IPv6 are looked for, too
		}
		if len(p.frame) != 14+20+8+2 || p.frame[14] != 0x45 || p.frame[42] != 'm' || p.through != "server/eth0" {
			t.Fatalf("%x through %s is not what was sent", p.frame, p.through)
		}
		if p.at.Before(begun.Add(-time.Second)) || p.at.After(time.Now().Add(time.Second)) {
			t.Errorf("died at %s", p.at)
		}
		died[p.frame[43]]++
	}
	for i := range packets {
		if died[byte(i)] != 1 {
			t.Errorf("packet %d is in the file %d times", i, died[byte(i)])
		}
	}
	if tcpdump, err := exec.LookPath("tcpdump"); err == nil {
		name := filepath.Join(t.TempDir(), "died.pcapng")
		w.must(os.WriteFile(name, file.Bytes(), 0o600))
		out, err := exec.Command(tcpdump, "-nr", name, "udp port 9").CombinedOutput()
		if n := strings.Count(string(out), "UDP, length 2"); err != nil || n != packets {
			t.Errorf("tcpdump finds %d packets: %v: %s", n, err, out)
		}
	}
}
