# A guest that knows whether its memory is right. QEMU starts it with -kernel (Multiboot), in 32-bit mode.
#
# It makes a number of 64 bits when it boots, which nobody else knows, and writes it to every page above 2 MiB, with the
# page's address and a count. Then, 50 times a second, it looks at each 16th page: is everything as it was left? If not it
# writes "bad" and the address to port 0xe9 (isa-debugcon), and halts. If so it counts up, and writes a line:
#
#	round 00000010 nonce 0123456789abcdef
#
# So a guest that goes on after a restore shows that its memory was restored. One that boots instead has another number.
#
#	as --32 -o guest.o guest.s && ld -m elf_i386 -Ttext 0x100000 -o guest guest.o

	.set PORT, 0xe9
	.set FIRST, 0x200000		# the first page
	.set GROUPS, 16			# a round looks at one page of so many

	.text
	.align 4
	.long 0x1badb002, 2, -(0x1badb002 + 2)	# Multiboot; it is to say how much memory there is

	.globl _start
_start:
	movl $stack, %esp
	movl 8(%ebx), %eax		# KiB above 1 MiB
	addl $1024, %eax
	shll $10, %eax
	andl $-4096, %eax
	movl %eax, end

	lgdt gdt_pointer
	ljmp $8, $1f
1:	movl $16, %eax
	movl %eax, %ds
	movl %eax, %es
	movl %eax, %ss

	movb $0x36, %al			# the timer: 1193182 Hz / 23864
	outb %al, $0x43
	movb $23864 & 255, %al
	outb %al, $0x40
	movb $23864 >> 8, %al
	outb %al, $0x40
	movl $timer, %eax		# the BIOS left IRQ 0 at vector 8
	movw %ax, idt + 8 * 8
	shrl $16, %eax
	movw %ax, idt + 8 * 8 + 6
	lidt idt_pointer
	movb $0xfe, %al			# nothing but the timer
	outb %al, $0x21
	movb $0xff, %al
	outb %al, $0xa1

	rdtsc
	imull $0x9e3779b1, %eax, %eax
	movl %eax, nonce
	rdtsc
	imull $0x85ebca6b, %eax, %eax
	movl %eax, nonce + 4
	xorl %eax, %eax

	# A page: the nonce, its address, the round that wrote it.
	movl $FIRST, %edi
2:	movl nonce, %eax
	movl %eax, (%edi)
	movl nonce + 4, %eax
	movl %eax, 4(%edi)
	movl %edi, 8(%edi)
	movl %edi, %eax
	shrl $12, %eax
	andl $GROUPS - 1, %eax
	movl %eax, 12(%edi)
	addl $4096, %edi
	cmpl end, %edi
	jb 2b

	movl $GROUPS, round
next:
	movl round, %edi
	andl $GROUPS - 1, %edi
	shll $12, %edi
	addl $FIRST, %edi
3:	movl nonce, %eax
	cmpl %eax, (%edi)
	jne bad
	movl nonce + 4, %eax
	cmpl %eax, 4(%edi)
	jne bad
	cmpl %edi, 8(%edi)
	jne bad
	movl round, %eax
	subl $GROUPS, %eax
	cmpl %eax, 12(%edi)
	jne bad
	addl $GROUPS, %eax
	movl %eax, 12(%edi)
	addl $4096 * GROUPS, %edi
	cmpl end, %edi
	jb 3b

	movl $word_round, %esi
	call print
	movl round, %eax
	call print_number
	movl $word_nonce, %esi
	call print
	movl nonce + 4, %eax
	call print_number
	movl nonce, %eax
	call print_number
	movb $'\n', %al
	outb %al, $PORT

	incl round
	xorl %eax, %eax
	sti
	hlt				# until the timer
	cli
	jmp next

bad:
	movl $word_bad, %esi
	call print
	movl %edi, %eax
	call print_number
	movb $'\n', %al
	outb %al, $PORT
4:	cli
	hlt
	jmp 4b

timer:
	pushl %eax
	movb $0x20, %al
	outb %al, $0x20
	popl %eax
	iret

# Text at %esi.
print:
	lodsb
	testb %al, %al
	jz 5f
	outb %al, $PORT
	jmp print
5:	ret

# %eax, in hexadecimal.
print_number:
	movl %eax, %edx
	movl $8, %ecx
6:	roll $4, %edx
	movl %edx, %eax
	andl $15, %eax
	movb digits(%eax), %al
	outb %al, $PORT
	loop 6b
	ret

word_round:	.asciz "round "
word_nonce:	.asciz " nonce "
word_bad:	.asciz "bad "
digits:		.ascii "0123456789abcdef"

	.align 8
gdt:	.quad 0, 0x00cf9a000000ffff, 0x00cf92000000ffff
gdt_pointer:
	.word . - gdt - 1
	.long gdt
	.align 8
idt:	.fill 8, 8, 0
	.word 0, 8, 0x8e00, 0		# vector 8
idt_pointer:
	.word . - idt - 1
	.long idt

	.align 8
nonce:	.quad 0
round:	.long 0
end:	.long 0
	.fill 1024
stack:
