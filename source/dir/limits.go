package dir

// Limits of what is read. They are far above what Kubernetes itself stores (1.5
// MiB an object) and keep a hostile or broken file from taking the memory of the
// machine.
const (
	// MaxFile is the largest file in bytes.
	MaxFile = 64 << 20
	// MaxYAML is the largest YAML document in bytes, because its tree takes several
	// times as much memory. Neither JSON nor many documents in a file have this limit.
	MaxYAML = 16 << 20
	// MaxObject is the largest single object in bytes of JSON.
	MaxObject = 4 << 20
	// MaxObjects is how many documents and objects a file may hold.
	MaxObjects = 500_000

	// maxYAMLValues bounds the values in a YAML document: a node of the tree
	// takes about 160 bytes whatever it says.
	maxYAMLValues = 1 << 20
	// maxObjectValues bounds the values in an object: a container written as {}
	// takes two bytes of text and a kilobyte of memory.
	maxObjectValues = 100_000
	// maxDepth is how deep mappings and lists may nest.
	maxDepth = 100
	// maxProblems is how many problems of one file are told one by one.
	maxProblems = 100
	// maxAliased is how many bytes the aliases in a YAML document may add to it,
	// maxAliasedFile those in all documents of a file together. Without aliases no
	// YAML is longer as values than twice its text.
	maxAliased     = 1 << 20
	maxAliasedFile = 16 << 20
	// maxBlame is the largest object whose faulty field is looked for.
	maxBlame = 256 << 10
)
