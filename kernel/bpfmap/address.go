package bpfmap

import (
	"encoding/binary"
	"net/netip"
)

// AddrWords are an address as the programs have it, struct address of bpf/address.h: both
// families in 16 bytes in network order, read as the host's words.
func AddrWords(addr netip.Addr) (words [4]uint32) {
	bytes := addr.As16()
	for i := range words {
		words[i] = binary.NativeEndian.Uint32(bytes[4*i:])
	}
	return words
}

// AddrOf is the address of such words.
func AddrOf(words [4]uint32) netip.Addr {
	var bytes [16]byte
	for i, word := range words {
		binary.NativeEndian.PutUint32(bytes[4*i:], word)
	}
	return netip.AddrFrom16(bytes).Unmap()
}
