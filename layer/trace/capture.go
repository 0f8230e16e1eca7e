package trace

import (
	"encoding/binary"
	"fmt"
	"io"
	"time"
)

// Capture writes packets that died as pcapng (IETF draft-ietf-opsawg-pcapng): an
// interface for each device of each namespace, and with each packet why and where it
// died. The Ethernet header is made up, but for its destination: most packets die
// without one.
type Capture struct {
	to         io.Writer
	name       func(space uint32) string
	begun      time.Time
	interfaces map[string]uint32
	err        error
	// Packets is how many were written.
	Packets uint64
}

// Blocks and options of pcapng.
const (
	sectionHeader  = 0x0a0d0d0a
	byteOrder      = 0x1a2b3c4d
	interfaceBlock = 1
	packetBlock    = 6
	optionComment  = 1
	optionName     = 2 // of an interface
	optionProgram  = 4 // of the section
	optionUnit     = 9 // of an interface's times
	linkEthernet   = 1
	nanoseconds    = 9
)

// NewCapture begins a file; packets are told their time from begun on, and name says how
// a namespace is called.
func NewCapture(to io.Writer, begun time.Time, name func(space uint32) string) *Capture {
	c := &Capture{to: to, name: name, begun: begun, interfaces: map[string]uint32{}}
	header := binary.LittleEndian.AppendUint32(nil, byteOrder)
	header = append(header, 1, 0, 0, 0)                           // version 1.0
	header = binary.LittleEndian.AppendUint64(header, ^uint64(0)) // of unknown length
	c.block(sectionHeader, option(header, optionProgram, []byte("millrace trace")))
	return c
}

// Write adds a packet.
func (c *Capture) Write(p Packet) {
	at := c.begun.Add(p.At).UnixNano()
	const made = 14
	b := binary.LittleEndian.AppendUint32(nil, c.through(p))
	b = binary.LittleEndian.AppendUint32(b, uint32(uint64(at)>>32))
	b = binary.LittleEndian.AppendUint32(b, uint32(at))
	b = binary.LittleEndian.AppendUint32(b, uint32(made+len(p.Data)))
	b = binary.LittleEndian.AppendUint32(b, uint32(made+max(p.Length, len(p.Data))))
	b = append(b, p.MAC[:]...)
	b = append(b, 0, 0, 0, 0, 0, 0)
	b = binary.BigEndian.AppendUint16(b, p.EtherType)
	b = padded(append(b, p.Data...))
	why := p.Reason
	if p.Location != "" {
		why = fmt.Sprintf("%s in %s", p.Reason, p.Location)
	}
	c.block(packetBlock, option(b, optionComment, fmt.Appendf(nil, "died: %s, namespace %s", why, c.name(p.Space))))
	c.Packets++
}

// Err is the first error of writing.
func (c *Capture) Err() error { return c.err }

// through is the number of the interface that a packet had.
func (c *Capture) through(p Packet) uint32 {
	name := c.name(p.Space)
	if p.Device != "" {
		name += "/" + p.Device
	}
	number, known := c.interfaces[name]
	if !known {
		number = uint32(len(c.interfaces))
		c.interfaces[name] = number
		b := []byte{linkEthernet, 0, 0, 0, 0, 0, 0, 0} // the longest packet: no limit
		b = option(b, optionName, []byte(name))
		c.block(interfaceBlock, option(b, optionUnit, []byte{nanoseconds}))
	}
	return number
}

// option adds one.
func option(b []byte, code uint16, value []byte) []byte {
	b = binary.LittleEndian.AppendUint16(b, code)
	b = binary.LittleEndian.AppendUint16(b, uint16(len(value)))
	return padded(append(b, value...))
}

func padded(b []byte) []byte {
	for len(b)%4 != 0 {
		b = append(b, 0)
	}
	return b
}

// block writes one whose body ends in options.
func (c *Capture) block(kind uint32, body []byte) {
	body = append(body, 0, 0, 0, 0) // the end of the options
	length := uint32(len(body) + 12)
	b := binary.LittleEndian.AppendUint32(nil, kind)
	b = binary.LittleEndian.AppendUint32(b, length)
	b = binary.LittleEndian.AppendUint32(append(b, body...), length)
	if _, err := c.to.Write(b); err != nil && c.err == nil {
		c.err = err
	}
}
