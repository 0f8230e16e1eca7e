package doctor

// Place is a network namespace of this node.
type Place struct {
	// Name is "node", "pod web-7f", "namespace blue", "pid 312 (nginx)"; Pod the pod's name
	// where it is one's.
	Name, Pod string
	// Path leads to it; it is empty for the one of this process.
	Path  string
	Inode uint32
}

// Places lists the network namespaces that processes or mounts lead to, the node's
// first, and says what could not be seen. Where the process is a container that plays a
// node, others of the host are left out, and nested says so.
func (h *Host) Places() (all []Place, unseen []string, nested bool, err error) {
	f := &Facts{}
	if err := h.find(f); err != nil {
		return nil, nil, false, err
	}
	for _, s := range f.Spaces {
		all = append(all, Place{Name: s.Name, Pod: s.pod, Path: s.path, Inode: uint32(s.inode)})
	}
	return all, f.Unseen, f.nested, nil
}
